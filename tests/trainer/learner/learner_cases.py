"""Training cases for the learner's tests, and the program of one process in a group of learners.

python -m tests.trainer.learner.learner_cases CASE.pt RANK      (CASE.pt: a `Case`; results go next to it)
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.objectives.preference import Config as PreferenceConfig
from llmquest_rl.objectives.preference import Preference
from llmquest_rl.objectives.preference import build as build_preference
from llmquest_rl.packing import split_ranks
from llmquest_rl.types import Sampling
from trainer.config.schema import LearnerConfig, OptimizerConfig
from trainer.learner.learner import Learner
from trainer.learner.setup import LearnerSetup

POLICY = Policy(resolve("grpo", {"beta": 0.1}), temperature=0.9, max_tokens=12)
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine", warmup_steps=2)
"""A large eps: updates are then smooth in the gradient, so that rounding stays rounding."""


def make_folder(folder: Path, tied: bool = False) -> Path:
    """A tiny model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(replace(LlamaConfig.tiny(), tied=tied).to_hf()))
    return folder


def make_setup(folder: Path, **changes: Any) -> LearnerSetup:
    """A learner on random weights."""
    setup = LearnerSetup(
        model_path=folder,
        objective=POLICY,
        optimizer=OPTIMIZER,
        learner=LearnerConfig(timeout_s=60),
        total_updates=20,
        tokens_per_microbatch=10_000,
        folder=folder / "run",
        init="random",
        threads=1,
    )
    return replace(setup, **changes)


def minibatches(seed: int, count: int = 2, groups: int = 5) -> list[list[SequenceGroup]]:
    """Weighed minibatches of groups with random tokens, advantages, and log-probs that an engine might have given."""
    generator = torch.Generator().manual_seed(seed)

    def ints(high: int, size: int) -> list[int]:
        return torch.randint(0, high, (size,), generator=generator).tolist()

    def group() -> SequenceGroup:
        completions = [ints(256, 1 + ints(11, 1)[0]) for _ in range(3)]
        advantages = [[float(torch.randn((), generator=generator))] * len(c) for c in completions]
        rollout = [(-5.5 + 0.3 * torch.randn(len(c), generator=generator)).tolist() for c in completions]
        return SequenceGroup(ints(256, 4), completions, {"advantages": advantages, "rollout_logprobs": rollout})

    return [POLICY.assign_token_weights([group() for _ in range(groups)]) for _ in range(count)]


def preference(method: str) -> Preference:
    """The objective of a preference method."""
    return build_preference(PreferenceConfig.model_validate({"method": method}), POLICY.algorithm, Sampling())


def pairs(method: str, seed: int, count: int = 2, groups: int = 5) -> list[list[SequenceGroup]]:
    """Weighted minibatches of pairs with random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 256, (size,), generator=generator).tolist()

    made = [[SequenceGroup(ints(1, 6), [ints(1, 12), ints(1, 12)]) for _ in range(groups)] for _ in range(count)]
    return [preference(method).assign_token_weights(minibatch) for minibatch in made]


def dpo_pairs(seed: int, count: int = 2, groups: int = 5) -> list[list[SequenceGroup]]:
    return pairs("dpo", seed, count, groups)


def kto_pairs(seed: int, count: int = 2, groups: int = 5) -> list[list[SequenceGroup]]:
    return pairs("kto", seed, count, groups)


def whole_weights(learner: Learner) -> dict[str, Tensor]:
    """A copy of all weights by their names on disk."""
    return {name: tensor.clone() for name, tensor in learner.weights()}


@dataclass
class Case:
    """The instructions for every process of a group."""

    setups: list[LearnerSetup]
    world_size: int
    port: int
    steps: int = 2
    epochs: int = 2
    groups: int = 5
    save_to: Path | None = None
    draw: Callable[..., list[list[SequenceGroup]]] = minibatches
    """Makes minibatches as `minibatches` does. It is a function of a module, because each process imports it."""


def run_steps(learner: Learner, case: Case, rank: int, first: int = 0) -> dict[str, float]:
    """Train on the same data with any number of processes."""
    metrics: dict[str, float] = {}
    for step in range(first, case.steps):
        shares = [
            split_ranks(sequence_groups, case.world_size)[rank]
            for sequence_groups in case.draw(step, groups=case.groups)
        ]
        metrics = learner.update(shares, case.epochs)
    return metrics


def run_group(case: Case) -> list[list[tuple[dict[str, Tensor], dict[str, float], list[Tensor]]]]:
    """Real processes over gloo: [ranks][setups] of final weights, metrics, and log-probs before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(replace(case, port=quiet_ports(len(case.setups))), path)
        command = [sys.executable, "-m", "tests.trainer.learner.learner_cases", str(path)]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(case.world_size)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
        return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(case.world_size)]


def quiet_ports(count: int) -> int:
    """The first of `count` free ports in a row, below the range from which other processes get theirs."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def main() -> None:
    path, rank = sys.argv[1], int(sys.argv[2])
    case: Case = torch.load(path, weights_only=False)
    results = []
    for i, setup in enumerate(case.setups):
        learner = Learner(setup, rank, case.world_size, "127.0.0.1", case.port + i)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo", "other interfaces are left alone"
        groups = case.draw(0, groups=case.groups)[0]
        scored = [] if setup.objective.labels else learner.logprobs(groups[rank :: case.world_size])
        metrics = run_steps(learner, case, rank)
        results.append((whole_weights(learner), metrics, scored))
        if case.save_to is not None:
            folder = case.save_to / str(i)
            folder.mkdir(parents=True, exist_ok=True)
            learner.save(folder)
            moved_on = run_steps(learner, replace(case, steps=case.steps + 1), rank, case.steps)
            expected = whole_weights(learner)
            learner.load(folder)
            again = run_steps(learner, replace(case, steps=case.steps + 1), rank, case.steps)
            assert {k: v for k, v in again.items() if "/learner" not in k and "_per_s" not in k} == {
                k: v for k, v in moved_on.items() if "/learner" not in k and "_per_s" not in k
            }
            for name, tensor in learner.weights():
                assert torch.equal(tensor, expected[name]), f"{name} differs after loading"
        learner.close()
    torch.save(results, f"{path}.{rank}")


if __name__ == "__main__":
    main()
