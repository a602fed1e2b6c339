"""Metrics of held-out groups: accuracy, mean@k and pass@k with confidence intervals."""

from collections.abc import Sequence
from dataclasses import replace

from llmquest_rl.types import Group, Score
from trainer.sources.intervals import accuracy, pass_at_k
from trainer.sources.next_token_eval import difficulty_metrics


def is_correct(score: Score, reward: str, threshold: float) -> bool:
    """True if the named reward reaches the threshold. A reward that does not apply counts as not correct."""
    part = score.parts.get(reward)
    return part is not None and part >= threshold


def equalized(group: Group, reward: str, threshold: float) -> Group:
    """The group, with the value 0 for every scored completion if none is correct: then none has an advantage."""
    if any(is_correct(score, reward, threshold) for score in group.scores if score.failure is None):
        return group
    equal = [replace(score, value=None if score.value is None else 0.0) for score in group.scores]
    return Group(group.problem, group.completions, equal)


def lengths_by_outcome(groups: Sequence[Group], reward: str, threshold: float) -> dict[str, float]:
    """Mean length in tokens of right and of wrong sampled completions; an empty class is left out.

    A length bias shows in wrong answers that grow longer than right ones (Dr. GRPO, arXiv 2503.20783, figure 5).
    """
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            if score.failure is None:
                lengths[is_correct(score, reward, threshold)].append(len(completion.token_ids))
    names = {True: "rollout/right_tokens", False: "rollout/wrong_tokens"}
    return {names[kind]: sum(found) / len(found) for kind, found in lengths.items() if found}


def accuracy_metrics(groups: Sequence[Group], reward: str, threshold: float) -> dict[str, float]:
    """Metrics of one evaluation; unscored completions are left out and counted.

    Args:
        groups: one for each held-out problem.
        reward: the name of the reward that decides whether a completion is correct.
        threshold: its smallest value that counts as correct.

    Raises:
        ValueError: no completion was scored.
    """
    outcomes = [
        [is_correct(score, reward, threshold) for score in group.scores if score.failure is None] for group in groups
    ]
    scored = [samples for samples in outcomes if samples]
    if not scored:
        raise ValueError(
            "evaluation: no held-out completion could be graded; try the rewards on a file of completions with "
            "`llmquest-rl grade`"
        )
    totals = [score.value for group in groups for score in group.scores if score.value is not None]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    estimate = accuracy(scored)
    metrics = {
        "eval/accuracy": estimate.value,
        "eval/accuracy_low": estimate.low,
        "eval/accuracy_high": estimate.high,
        "eval/problems": float(len(scored)),
        "eval/unscored": float(sum(score.failure is not None for group in groups for score in group.scores)),
        "eval/completion_tokens": sum(lengths) / max(1, len(lengths)),
    }
    if totals:
        metrics["eval/reward"] = sum(totals) / len(totals)
    fewest = min(map(len, scored))
    for k in (1 << i for i in range(1, fewest.bit_length())):
        estimate = pass_at_k(scored, k)
        metrics |= {f"eval/pass_at_{k}": estimate.value}
        metrics |= {f"eval/pass_at_{k}_low": estimate.low, f"eval/pass_at_{k}_high": estimate.high}
    return metrics | difficulty_metrics(groups, outcomes)
