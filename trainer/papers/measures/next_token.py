"""Hit rates of next-token reasoning on the same held-out positions for every arm, with and without thinking.

An arm may train on other text, or on another objective; the positions are those of the first arm that learns from
rollouts, scored by the start model.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmquest_rl.data.positions import DIFFICULTIES
from llmquest_rl.models.checkpoint.count import count_parameters
from trainer.config.load import parse_config
from trainer.config.rules import from_rollouts
from trainer.inference import evaluate
from trainer.papers.measures import Trained
from trainer.papers.series import Rows
from trainer.run.folder import RunFolder
from trainer.run.tracking import JsonLines
from trainer.run.trained import trained_model
from trainer.sources.next_token_eval import ACCURACY, ARGMAX

START = "start model"
THINKING, PLAIN = "thinking", "argmax"


def labels(arms: Iterable[str]) -> set[str]:
    """Labels of the rows that `measure` returns."""
    return {f"{name}, {how}" for name in (*arms, START) for how in (THINKING, PLAIN)}


def measure(trained: Trained) -> dict[str, Rows]:
    """One row per difficulty for each arm and the start model, with and without thinking.

    A row has `step` and `entropy above` (the threshold in nats), `hit rate`, and `GFLOP` (arithmetic of the training).
    """
    first = next(config for config in trained.configs.values() if from_rollouts(config))
    values = first.model_dump(mode="json")
    values["data"]["task"]["proxy"] = str(trained.start)
    values["rollout"]["engine"] = {"name": "native"}
    found = {START: _hit_rates(trained.start, values, 0.0)}
    for arm, run in trained.runs.items():
        found[arm] = _hit_rates(trained_model(str(run)), values, _gigaflop(run, trained.start))
    return {f"{name}, {how}": rows[how] for how in (THINKING, PLAIN) for name, rows in found.items()}


def _hit_rates(model: Path, values: dict[str, Any], gigaflop: float) -> dict[str, Rows]:
    values["model"]["path"] = str(model)
    metrics, _ = evaluate(parse_config(values))
    return {
        how: [
            {"step": limit, "entropy above": limit, "hit rate": metrics[keys[difficulty]], "GFLOP": gigaflop}
            for difficulty, limit in DIFFICULTIES.items()
            if keys[difficulty] in metrics
        ]
        for how, keys in ((THINKING, ACCURACY), (PLAIN, ARGMAX))
    }


def _gigaflop(run: Path, model: Path) -> float:
    """Arithmetic of a run: 2 operations per weight and sampled token, and 6 per weight and token of an update."""
    weights = count_parameters(model).total
    rows = JsonLines(RunFolder(run).metrics).read()
    sampled, learnt = (sum(row.get(key) or 0.0 for row in rows) for key in ("rollout/tokens", "learner/tokens"))
    return weights * (2 * sampled + 6 * learnt) / 1e9
