"""Counts failed rewards, and stops the run if there are too many: a broken reward must not look like a reward of 0."""

from collections import Counter
from collections.abc import Iterable, Sequence

from llmquest_rl.types import Score
from rewards.types import GradeItem

EXAMPLES_SHOWN = 3
TEXT_SHOWN = 300
"""Characters shown in an example: the end of the prompt and of the completion, and the start of the message."""


class TooManyUnscoredError(RuntimeError):
    """Too many completions have no score because a reward failed."""


def failure_counts(scores: Sequence[Score]) -> dict[str, int]:
    """Number of failed scores by kind."""
    return dict(Counter(score.failure for score in scores if score.failure is not None))


def check_unscored(scores: Sequence[Score], items: Iterable[GradeItem], limit: float) -> dict[str, int]:
    """Number of failed scores by kind. A reward that does not apply has not failed.

    Args:
        scores: The scores of one step, in the order of `items`.
        limit: The maximum share of failures.

    Raises:
        TooManyUnscoredError: the share is larger; the message has the counts by kind and some examples.
    """
    failures = failure_counts(scores)
    share = sum(failures.values()) / max(1, len(scores))
    if share <= limit:
        return failures
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(failures.items()))
    failed = [(item, score) for item, score in zip(items, scores, strict=True) if score.failure is not None]
    examples = "\n".join(_example(item, score) for item, score in _one_of_each_kind_first(failed)[:EXAMPLES_SHOWN])
    raise TooManyUnscoredError(
        f"{share:.0%} of {len(scores)} completions could not be graded ({counts}); graders.max_unscored_share allows "
        f"{limit:.0%}. Examples:\n{examples}\n"
        "Try a reward on a file of completions with `llmquest-rl grade`, or raise graders.timeout_s or memory_mb."
    )


def _one_of_each_kind_first(failed: list[tuple[GradeItem, Score]]) -> list[tuple[GradeItem, Score]]:
    seen: Counter[str | None] = Counter()
    ranked = []
    for position, (item, score) in enumerate(failed):
        ranked.append((seen[score.failure], position, item, score))
        seen[score.failure] += 1
    return [(item, score) for _, _, item, score in sorted(ranked, key=lambda entry: entry[:2])]


def _example(item: GradeItem, score: Score) -> str:
    prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"] if item.prompt else ""
    return (
        f"- {score.failure}: {score.detail[:TEXT_SHOWN]}\n"
        f"  prompt ends: {prompt[-TEXT_SHOWN:]!r}\n"
        f"  completion ends: {item.completion[-TEXT_SHOWN:]!r}\n"
        f"  answer: {str(item.answer)[:TEXT_SHOWN]!r}"
    )
