"""Configures and trains the algorithm `tilted_grpo`, whose surrogate lies in a folder outside the package.

python -m tests.algorithms.with_new_surrogates FOLDER OUT       (results go to OUT/result.json)
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from llmquest_rl.algorithms import surrogates

if TYPE_CHECKING:
    from trainer.config.schema import Config


def config(**algorithm: Any) -> "Config":
    """A recipe with this section `algorithm`."""
    from trainer.config.load import parse_config

    values = {
        "name": "tilted",
        "steps": 2,
        "cluster": "inline",
        "data": {"task": {"name": "arithmetic"}},
        "rewards": [{"name": "exact_number"}],
        "algorithm": algorithm,
    }
    return parse_config(values)


def problems(**algorithm: Any) -> list[str]:
    """The problems of a recipe with this section."""
    from trainer.config.load import ConfigError

    try:
        config(**algorithm)
    except ConfigError as error:
        return error.problems
    return []


def configured() -> dict[str, Any]:
    """The new file as configurations, the table of algorithms and the reference see it."""
    from trainer.cli.algorithm_table import algorithm_table
    from trainer.config.load import dump, parse_config
    from trainer.config.reference_docs import reference

    row = config(name="tilted_grpo", pull=0.3)
    keys = ("| `slope`", "| `pull`", "| `surrogate`")
    return {
        "settings": [row.algorithm.slope, row.algorithm.pull],
        "again": parse_config(yaml.safe_load(dump(row))).algorithm.pull,
        "with_another_row": config(name="dapo", surrogate="tilted", slope=3.0).algorithm.slope,
        "unread": problems(name="grpo", pull=0.3),
        "unknown": problems(name="tilted_grpo", pul=0.3),
        "wrong": problems(name="tilted_grpo", slope=-1.0),
        "table": {str(column.header): str(list(column.cells)[-1]) for column in algorithm_table().columns},
        "reference": [line for line in reference().splitlines() if line.startswith(keys)],
    }


def trained(folder: Path, **algorithm: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """Weights before and after two steps, and the metrics of the steps."""
    from tests.trainer.learner.learner_cases import make_folder, make_setup, minibatches, whole_weights
    from trainer.learner.learner import Learner

    run = config(**algorithm)
    objective = run.objective.module.build(run.objective.options, run.algorithm, run.rollout.sampling)
    learner = Learner(make_setup(make_folder(folder), objective=objective))
    try:
        before = whole_weights(learner)
        metrics = [learner.update(minibatches(step), 1) for step in range(2)]
        return before, whole_weights(learner), metrics
    finally:
        learner.close()


def differ(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return any(not torch.equal(some[name], others[name]) for name in some)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    surrogates.__path__.append(str(folder))  # before anything imports the tables of the package
    before, after, metrics = trained(out / "model", name="tilted_grpo")
    _, pulled, _ = trained(out / "model", name="tilted_grpo", pull=5.0)
    result = configured() | {"moved": differ(before, after), "pull_matters": differ(after, pulled), "metrics": metrics}
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
