"""Sample completions of a step: the rows of `completions.jsonl`, and the table that is printed.

Beside the rewards a row has three signals of a policy that exploits its reward: the length of the completion, its
repetition, and its KL to the reference model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from llmquest_rl.algorithms.sequence_groups import repetition
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.deferred import torch
from llmquest_rl.types import Completion, Group, Score


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with its group and score."""

    group: Group
    completion: Completion
    score: Score

    def sequence_group(self) -> SequenceGroup:
        """The completion as a sequence group."""
        problem = self.group.problem
        images = None if problem.images is None else torch.from_numpy(problem.images)
        return SequenceGroup(problem.prompt_ids, [self.completion.token_ids], images=images)

    def record(self, step: int, kl: float | None) -> dict[str, Any]:
        """The row of `completions.jsonl`."""
        return {
            "step": step,
            "problem": self.group.problem.id,
            "prompt": self.group.problem.prompt,
            "completion": self.completion.text,
            "answer": self.group.problem.answer,
            "reward": self.score.value,
            "rewards": self.score.parts,
            "failure": self.score.failure,
            "detail": self.score.detail,
            "finish_reason": self.completion.finish_reason,
            "num_tokens": len(self.completion.token_ids),
            "repetition": repetition(self.completion.token_ids),
            "kl": kl,
            "weight_version": self.completion.weight_version,
        }


KLToReference = Callable[[Sequence[Sample]], Sequence[float | None]]
"""Gives log pi(y) - log pi_ref(y) of each completion y in nats, or None if there is no reference model."""


def unknown_kl(samples: Sequence[Sample]) -> list[None]:
    """No KL, for runs without a reference model."""
    return [None] * len(samples)


def sample_rows(step: int, groups: Sequence[Group], count: int, kl: KLToReference = unknown_kl) -> list[dict[str, Any]]:
    """`count` completions as rows of `completions.jsonl`: failures first (at most half), then each group in turn."""
    members = [list(zip(group.completions, group.scores, strict=True)) for group in groups]
    widest = max(map(len, members), default=0)
    pairs = list(zip(groups, members, strict=True))
    samples = [Sample(group, *member[i]) for i in range(widest) for group, member in pairs if i < len(member)]
    failed = [sample for sample in samples if sample.score.failure is not None]
    graded = [sample for sample in samples if sample.score.failure is None]
    chosen = [*failed[: count // 2], *graded, *failed[count // 2 :]][:count]
    return [sample.record(step, value) for sample, value in zip(chosen, kl(chosen), strict=True)]


def completions_table(rows: Sequence[Mapping[str, Any]], title: str = "sample completions", width: int = 400) -> Table:
    """Sample completions as a table; the middle of texts longer than `width` characters is left out."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("problem", "prompt", "completion", "answer", "reward", "signals"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        parts = [f"{name} {'-' if part is None else format(part, '.3g')}" for name, part in row["rewards"].items()]
        total = f"unscored: {row['failure']}" if row["reward"] is None else f"{row['reward']:.3g}"
        ending = " [cut at the token limit]" if row["finish_reason"] == "length" else ""
        texts = (row["problem"], prompt, row["completion"] + ending, str(row["answer"]), "\n".join([total, *parts]))
        table.add_row(*(Text(_shorten(text, width)) for text in (*texts, _signals(row))))
    return table


def _signals(row: Mapping[str, Any]) -> str:
    kl = [] if row["kl"] is None else [f"KL {row['kl']:.3g}"]
    return "\n".join([f"{row['num_tokens']} tokens", f"repeated {row['repetition']:.0%}", *kl])


def _shorten(text: str, width: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
