"""Accuracy of each checkpoint's own answers, and their KL to the start model: the two axes of DPO's figure 2.

Training on given answers does not sample any, so its curves do not show what the policy itself would say.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.types import Group
from trainer.config.load import parse_config
from trainer.config.schema import Config
from trainer.inference import evaluate
from trainer.papers.measures import Trained
from trainer.papers.series import Rows
from trainer.run.folder import RunFolder
from trainer.run.trained import MODEL

ABSCISSA = "KL to the start model (nats per answer)"


def labels(arms: Iterable[str]) -> set[str]:
    """Labels of the rows that `measure` returns."""
    return {f"{arm}, own answers" for arm in arms}


def measure(trained: Trained) -> dict[str, Rows]:
    """A row for the start model and for every checkpoint of each arm."""
    start = load_model(trained.start, torch.float32)
    rows: dict[str, Rows] = {}
    first: dict[str, float] | None = None
    for arm, run in trained.runs.items():
        config = trained.configs[arm]
        first = first or _row(0, trained.start, config, start)
        checkpoints = sorted(RunFolder(run).checkpoints.glob("step-*"))
        later = [_row(int(path.name.removeprefix("step-")), path / MODEL, config, start) for path in checkpoints]
        rows[f"{arm}, own answers"] = [first, *later]
    return rows


def _row(step: int, model: Path, config: Config, start: CausalLM) -> dict[str, float]:
    values = config.model_dump(mode="json")
    values["model"]["path"], values["objective"] = str(model), {"name": "policy"}
    metrics, groups = evaluate(parse_config(values))
    return {"step": step, "own accuracy": metrics["eval/accuracy"], ABSCISSA: mean_kl(groups, start)}


@torch.no_grad()
def mean_kl(groups: Sequence[Group], start: CausalLM) -> float:
    """The mean over completions of the sum over tokens of log pi - log pi_start: an unbiased estimate of their KL."""
    answers = [SequenceGroup(g.problem.prompt_ids, [c.token_ids for c in g.completions]) for g in groups]
    sampled = sum(sum(c.logprobs) for g in groups for c in g.completions)
    total = sampled - float(start(collate(answers)).logprobs.double().sum())
    return total / sum(len(g.completions) for g in groups)
