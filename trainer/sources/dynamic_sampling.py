"""Dynamic sampling: a step samples further prompts until it has enough groups with an advantage to learn from.

DAPO, arXiv 2503.14476, section 3.2, equation 11. A round waits for all of its completions, and the usable groups are
taken in the order of their prompts, so that short completions are not preferred. Usable groups beyond
`batch.prompts_per_step` are counted, and kept for the next step as long as the engine's weights are the same
(`rollout.weight_sync_interval` above 1).
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.sequence_groups import is_usable
from llmquest_rl.types import Group
from trainer.config.schema import BatchConfig
from trainer.run.samples import sample_rows
from trainer.sources.rollouts import Sampled

log = logging.getLogger(__name__)

VALUES_SHOWN = 8
EXAMPLES_SHOWN = 4
TEXT_SHOWN = 300
"""Characters of a prompt's or completion's end in an example."""


class NothingUsableError(RuntimeError):
    """No round of a step yielded a usable group."""


class DynamicSampling:
    """Collects usable groups round by round, until the step has enough or `batch.max_rounds` is reached."""

    def __init__(self, batch: BatchConfig, algorithm: Algorithm) -> None:
        """`batch` gives the numbers of groups and rounds; `algorithm` decides which groups are usable."""
        self._batch = batch
        self._algorithm = algorithm
        self._usable: list[Group] = []
        self._reused = 0
        self._sampled: list[Group] = []
        self._rounds: list[dict[str, float]] = []

    def prompts_to_sample(self) -> int:
        """Number of prompts in the next round; 0 = the step has enough groups, or its last round is over."""
        missing = self._batch.prompts_per_step - len(self._usable)
        if missing <= 0 or len(self._rounds) == self._batch.max_rounds:
            return 0
        return self._batch.prompts_to_sample(missing)

    def add(self, groups: list[Group], metrics: dict[str, float]) -> None:
        """Take the groups of one round, with the metrics of `Rollouts.run`."""
        self._sampled += groups
        self._usable += [group for group in groups if is_usable(group, self._algorithm)]
        self._rounds.append(metrics)

    def finish(self) -> Sampled:
        """End the step: at most `prompts_per_step` usable groups, at least one, and metrics over all rounds.

        Raises:
            NothingUsableError: no round yielded a usable group; the message shows the rewards and some completions.
        """
        usable, sampled, rounds, target = self._usable, self._sampled, self._rounds, self._batch.prompts_per_step
        if not usable:
            raise NothingUsableError(_nothing_usable(sampled, len(rounds)))
        _warn_if_missing(target, len(usable), len(sampled), len(rounds))
        metrics = _over_all(rounds) | {
            "rollout/rounds": float(len(rounds)),
            "rollout/sampled_groups": float(len(sampled)),
            "rollout/usable_group_share": (len(usable) - self._reused) / max(1, len(sampled)),
            "rollout/reused_groups": float(self._reused),
            "rollout/surplus_groups": float(max(0, len(usable) - target)),
            "rollout/missing_groups": float(max(0, target - len(usable))),
            "reward/sampled_mean": fmean(_rewards(sampled or usable)),
        }
        self._usable, self._reused = usable[target:], len(usable[target:])
        self._sampled, self._rounds = [], []
        return usable[:target], metrics

    def forget(self) -> None:
        """Drop the surplus groups, because the engines have got new weights."""
        self._usable, self._reused = [], 0


def _warn_if_missing(target: int, usable: int, sampled: int, rounds: int) -> None:
    if usable < target:
        log.warning(
            "dynamic sampling: %d of %d groups were usable in %d rounds, so this step has %d groups fewer than "
            "batch.prompts_per_step (%d). To sample more rounds, raise batch.max_rounds.",
            *(usable, sampled, rounds, target - usable, target),
        )


def _over_all(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics over all rounds: sums of times and tokens; for the others, which are cumulative, the last values."""
    sums = {name: sum(part[name] for part in rounds) for name in ("time/generate_s", "time/grade_s", "rollout/tokens")}
    last = rounds[-1] if rounds else {}  # there is no round if surplus groups filled the step
    return {**last, **sums, "rollout/tokens_per_s": sums["rollout/tokens"] / max(sums["time/generate_s"], 1e-9)}


def _rewards(groups: Sequence[Group]) -> list[float]:
    return [score.value for group in groups for score in group.scores if score.value is not None]


def _nothing_usable(sampled: Sequence[Group], rounds: int) -> str:
    rewards = _rewards(sampled)
    completions = [completion for group in sampled for completion in group.completions]
    cut = sum(completion.finish_reason == "length" for completion in completions)
    counts = Counter(rewards).most_common()
    shown = ", ".join(f"{count} x {value:g}" for value, count in counts[:VALUES_SHOWN]) or "none"
    others = sum(count for _, count in counts[VALUES_SHOWN:])
    examples = "\n".join(map(_example, sample_rows(0, sampled, EXAMPLES_SHOWN)))
    return (
        f"dynamic sampling found nothing to learn from in {len(sampled)} groups of {rounds} rounds. Rewards: {shown}"
        f"{f', {others} x other values' if others else ''}; {len(completions) - len(rewards)} of {len(completions)} "
        f"completions have no score, {cut} were cut at the token limit. Examples:\n{examples}\n"
        "The task is too hard or too easy for this model, or the reward does not read its answers, or (with "
        "algorithm.overlong_filter) most completions are cut. Other prompts, a larger batch.samples_per_prompt or "
        "batch.max_rounds may help; with algorithm.dynamic_sampling: false the run goes on without an update."
    )


def _example(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] if row["prompt"] else ""
    return (
        f"- reward {row['reward']}, {row['num_tokens']} tokens, ended by {row['finish_reason']}\n"
        f"  prompt ends: {prompt[-TEXT_SHOWN:]!r}\n"
        f"  completion ends: {row['completion'][-TEXT_SHOWN:]!r}\n"
        f"  answer: {str(row['answer'])[:TEXT_SHOWN]!r}"
    )
