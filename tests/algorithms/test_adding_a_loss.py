"""A new loss is one file: its formula, its settings and its row of the table of algorithms.

The tables of the package are made when it is imported, so the file is in a temporary folder on the package's path and
the test runs in a separate process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TILTED = '''
"""The importance-weighted policy gradient, with a quadratic penalty on the log-ratio."""

from torch import Tensor

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens
from llmquest_rl.algorithms.variant import PositiveFinite, Row, Weight
from llmquest_rl.options import Options


class Settings(Options):
    """Settings of `tilted`."""

    slope: PositiveFinite = 1.0
    """`tilted`: factor of the policy gradient."""
    pull: Weight = 0.1
    """`tilted`: weight of the squared log-ratio."""


def loss(tokens: Tokens, settings: Settings) -> Tensor:
    """-slope r A + pull (log r)^2."""
    penalty = settings.pull * tokens.ratio.log().square()
    return -settings.slope * tokens.ratio * tokens.advantages + penalty


SURROGATE = Surrogate(
    loss,
    Settings,
    " {slope:g}, {pull:g}",
    rows={"tilted_grpo": Row("A paper, arXiv 0000.00000", {"surrogate": "tilted", "slope": 2.0, "beta": 0.0})},
)
'''


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, out = tmp_path_factory.mktemp("surrogates"), tmp_path_factory.mktemp("out")
    (folder / "tilted.py").write_text(TILTED)
    command = [sys.executable, "-m", "tests.algorithms.with_new_surrogates", str(folder), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def test_its_row_and_its_settings_are_configured_like_any_other(result: dict[str, Any]) -> None:
    assert result["settings"] == [2.0, 0.3]
    assert result["again"] == 0.3, "the saved configuration has the setting"
    assert result["with_another_row"] == 3.0


def test_mistakes_in_its_settings_are_told(result: dict[str, Any]) -> None:
    [unread], [unknown], [wrong] = result["unread"], result["unknown"], result["wrong"]
    assert "pull is read only with surrogate: tilted, so here pull: 0.3 would change nothing" in unread
    assert "algorithm.pul: unknown key; did you mean pull" in unknown
    assert "algorithm.slope: expected greater than 0" in wrong


def test_the_table_and_the_reference_have_it(result: dict[str, Any]) -> None:
    table = result["table"]
    assert (table["name"], table["surrogate"]) == ("tilted_grpo", "tilted 2, 0.1")
    assert table["paper"] == "A paper, arXiv 0000.00000"
    surrogate, *settings = sorted(result["reference"], key=lambda line: "`surrogate`" not in line.split("|")[1])
    assert "`tilted`" in surrogate
    assert [line.split("|")[1].strip() for line in sorted(settings)] == ["`pull`", "`slope`"]
    assert any("weight of the squared log-ratio" in line for line in settings)


def test_it_trains(result: dict[str, Any]) -> None:
    assert result["moved"] and result["pull_matters"]
    for metrics in result["metrics"]:
        assert metrics["learner/skipped_updates"] == 0
        assert metrics["learner/grad_norm"] > 0
        assert "policy/clip_frac" not in metrics, "it has no bound"
