"""Settings of every test: no network, few threads, and the caches that tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: it listens on loopback only
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker has a core of its own; read when torch is imported

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ONE_VLLM = {"test_vllm.py", "test_engines_agree.py", "test_worker.py"}
"""Files whose tests share one running vLLM, so they go to the same test worker. Any other file is its own group."""
COST = {"slow": 10.0, "ray": 10.0}
"""Duration of a test with this mark, relative to a test without."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none; with several workers long groups come first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        sort_by_cost(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Shares out groups of tests. (xdist 3.8 has marks for groups, but pytest 9.2 does not show them to it.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def sort_by_cost(items: list[pytest.Item]) -> None:
    """The longest group first, so that workers end at about the same time."""
    costs: Counter[str] = Counter()
    for item in items:
        marked = sum(cost for mark, cost in COST.items() if item.get_closest_marker(mark))
        costs[group_of(item.nodeid)] += marked or 1.0
    items.sort(key=lambda item: (-costs[group_of(item.nodeid)], group_of(item.nodeid)))


def group_of(nodeid: str) -> str:
    """The group of a test: all of it runs in one worker."""
    file = nodeid.partition("::")[0]
    return "one vLLM" if Path(file).name in ONE_VLLM else file
