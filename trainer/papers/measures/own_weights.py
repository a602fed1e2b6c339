"""How well the trained models themselves answer, with the learner's weights as they are.

Training curves are those of the engine, which may round them.
"""

from collections.abc import Iterable

from trainer.config.load import parse_config
from trainer.inference import evaluate, trained_model
from trainer.papers.measures import Trained
from trainer.papers.series import Rows

SAMPLES = 4
"""Of each problem."""


def labels(arms: Iterable[str]) -> set[str]:
    """What `measure` gives rows of."""
    return {f"{arm}, own weights" for arm in arms}


def measure(trained: Trained) -> dict[str, Rows]:
    """One row by arm: `own accuracy`, on the held-out problems, sampled as the recipe's evaluations are."""
    rows: dict[str, Rows] = {}
    for arm, run in trained.runs.items():
        values = trained.configs[arm].model_dump(mode="json")
        values["model"]["path"] = str(trained_model(str(run)))
        values["rollout"]["engine"] = {"name": "native"}
        values["eval"]["samples_per_prompt"] = SAMPLES
        metrics, _ = evaluate(parse_config(values))
        rows[f"{arm}, own weights"] = [{"step": values["steps"], "own accuracy": metrics["eval/accuracy"]}]
    return rows
