"""Accuracy of the trained models with the learner's exact weights.

Training curves come from the engine, which may round the weights.
"""

from collections.abc import Iterable

from trainer.config.load import parse_config
from trainer.inference import evaluate
from trainer.papers.measures import Trained
from trainer.papers.series import Rows
from trainer.run.trained import trained_model

SAMPLES = 4
"""Completions of each problem."""


def labels(arms: Iterable[str]) -> set[str]:
    """Labels of the rows that `measure` returns."""
    return {f"{arm}, own weights" for arm in arms}


def measure(trained: Trained) -> dict[str, Rows]:
    """One row with `own accuracy` per arm: on held-out problems, sampled as in the recipe's evaluations."""
    rows: dict[str, Rows] = {}
    for arm, run in trained.runs.items():
        values = trained.configs[arm].model_dump(mode="json")
        values["model"]["path"] = str(trained_model(str(run)))
        values["rollout"]["engine"] = {"name": "native"}
        values["eval"]["samples_per_prompt"] = SAMPLES
        metrics, _ = evaluate(parse_config(values))
        rows[f"{arm}, own weights"] = [{"step": values["steps"], "own accuracy": metrics["eval/accuracy"]}]
    return rows
