"""Numbers that can be merged: over microbatches, over optimizer updates, and over processes.

A mean is carried as a sum and a count, so that merging parts of any size gives the mean of the whole.
Names read `area/what_unit`; `DESCRIPTIONS` says what each one is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["mean", "sum", "max"]
Number = float | Tensor
"""A float, or a tensor with one element: left on its device until `to_floats`, since fetching it means waiting."""

DESCRIPTIONS: dict[str, str] = {
    "reward/mean": "weighted total reward of a sample, mean over the scored samples of the step",
    "reward/std": "standard deviation of the total reward over all scored samples of the step",
    "reward/group_std": "standard deviation of the total reward within a group, mean over groups",
    "reward/<name>": "one reward by name, before weighting, mean over the samples that it applies to",
    "reward/zero_std_group_share": "share of groups whose rewards are all equal: they have no advantage to learn from",
    "reward/length_penalty": "what the lengths of completions added to their rewards, mean over scored samples",
    "reward/unscored_share": "share of samples without a score: in neither baseline nor loss",
    "reward/scored_samples": "samples with a score",
    "rollout/completion_tokens": "length of a completion in tokens, mean",
    "rollout/completion_tokens_max": "length of the longest completion in tokens",
    "rollout/truncated_share": "share of completions that were cut at the token limit",
    "rollout/right_tokens": "length in tokens of a completion that counts as correct, mean; absent where none does",
    "rollout/wrong_tokens": "the same of the other scored completions",
    "rollout/staleness": "steps that the learners were ahead of the weights that sampled, of the oldest of them",
    "rollout/empty_samples": "completions without a token: left out",
    "rollout/rounds": "dynamic sampling: rounds in which the step asked prompts",
    "rollout/sampled_groups": "dynamic sampling: groups sampled in all rounds, usable or not",
    "rollout/usable_group_share": "share of them whose rewards teach something",
    "rollout/reused_groups": "usable groups that an earlier step with the same weights left over",
    "rollout/surplus_groups": "usable groups beyond prompts_per_step: kept until new weights are pushed, then dropped",
    "rollout/missing_groups": "groups that the step was short of when batch.max_rounds ended the search",
    "reward/sampled_mean": "dynamic sampling: total reward, mean over the scored samples of all rounds; not selected",
    "policy/loss": "weighted mean of the token losses; near 0 while ratios are 1, because advantages sum to 0",
    "policy/entropy": "entropy of the next-token distribution in nats, mean over tokens",
    "policy/clip_frac": "share of tokens that the surrogate cut: no gradient (`clipped_weight`: another weight)",
    "policy/clip_low_frac": "the part of it at the lower bound (and a negative advantage, but for `clipped_weight`)",
    "policy/clip_high_frac": "the part of it at the upper bound (and a positive advantage, the same), or at dual_clip",
    "policy/clip_frac_rare": "share of the tokens below 0.1 under the old policy, where reasoning forks, that was cut",
    "policy/clip_frac_common": "share of the other tokens that was cut",
    "policy/ratio": "importance ratio of the current to the old policy, mean over tokens",
    "policy/ratio_max": "largest importance ratio",
    "policy/kl": "k3 estimate of KL(policy || reference) in nats, mean over tokens",
    "policy/approx_kl": "k3 estimate of KL(old policy || current policy) in nats, mean over tokens",
    "policy/logp_gap": "absolute difference of engine's and learner's log-prob of a sampled token in nats, mean",
    "policy/logp_gap_max": "largest such difference",
    "policy/logp_gap_k3": "k3 estimate of KL(engine || learner) in nats, mean over tokens",
    "policy/tis_weight": "importance weight between engine and learner after the correction's bounds, mean over tokens",
    "policy/tis_capped_share": "share of tokens whose importance weight was cut at a bound, or dropped",
    "policy/tis_square": "square of that weight, mean over tokens",
    "policy/tis_ess": "effective sample size of these weights as a share of tokens; 1 = engine and learner agree",
    "policy/off_policy_share": "share of tokens that off_policy_delta left out of the policy loss",
    "policy/low_entropy_share": "share of tokens that top_entropy_fraction left out of the policy loss",
    "policy/tokens": "completion tokens in the loss",
    "train/loss": "next-token loss in nats, mean over target tokens; of a classifier: cross-entropy, over sequences; "
    "of a reward model: Bradley-Terry, over pairs, without the term that centres scores",
    "train/perplexity": "exp of the next-token loss",
    "train/tokens": "target tokens in the loss",
    "train/accuracy": "share of sequences whose label has the highest score; of a reward model: of pairs ranked right",
    "train/margin": "score of the chosen reply minus that of the rejected one, mean over pairs",
    "train/reward_mean": "score of a reply, mean over both of every pair",
    "train/reward_square": "square of it, mean",
    "train/reward_std": "standard deviation of the scores of replies",
    "train/pairs": "pairs of replies in the loss",
    "train/sequences": "sequences with a label in the loss",
    "eval/loss": "train/loss on held-out sequences",
    "eval/perplexity": "exp of the next-token loss",
    "eval/tokens": "target tokens of the held-out sequences",
    "eval/sequences": "held-out sequences with a label",
    "aux/<name>": "a loss that the model itself asks for, by name, mean over microbatches weighted by their tokens",
    "moe/max_vio": "largest load of an expert over the mean load, minus 1, in an update; mean over layers; 0: equal",
    "moe/max_vio_worst": "the same in the layer where it is largest",
    "moe/expert_tokens_min": "fewest tokens that an expert of any layer got in an update",
    "moe/expert_tokens_max": "most tokens that an expert of any layer got in an update",
    "moe/idle_share": "share of experts that no token of an update chose",
    "moe/entropy": "entropy of the router's distribution over experts in nats, mean over tokens and layers",
    "moe/changed_share": "share of tokens' choices of experts that were others for old_logprobs, mean over updates",
    "learner/grad_norm": "global L2 norm of the gradient before clipping, mean over the step's updates",
    "learner/lr": "learning rate of the step's last update",
    "learner/updates": "optimizer updates attempted since the start of the run",
    "learner/skipped_updates": "updates skipped since the start of the run because of NaN or inf in loss or gradients",
    "learner/tokens": "tokens computed in forward and backward passes of the step, shared prompts counted once",
    "learner/tokens_per_s": "the same by second, all learner processes together",
    "learner/microbatches": "forward and backward passes of the step in each process",
    "memory/learner_peak_gb": "largest memory of a learner process so far: GPU memory, or resident memory on a CPU",
    "time/learner_prepare_s": "seconds for old and reference log-probs, the slowest process",
    "time/learner_update_s": "seconds for forward and backward passes and optimizer updates, the slowest process",
}
"""Every name given by algorithms, dynamic sampling, objectives and the learner. `<name>` stands for any word."""


Derived = tuple[tuple[str, ...], Callable[..., float]]
"""Names of merged metrics, and the function of their values that is a metric of its own."""


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 if whole is 0."""
    return part / whole if whole else 0.0


DERIVED: dict[str, Derived] = {"learner/tokens_per_s": (("learner/tokens", "time/learner_update_s"), ratio)}
"""Metrics that are computed from merged ones, by name. An objective may derive more."""


@dataclass(slots=True)
class Entry:
    """One reducible value: `total / count` for a mean, `total` otherwise."""

    kind: Kind
    total: Number
    count: Number = 1.0


def _largest(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


class Metrics:
    """Named reducible values. Give every name one kind only."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def mean(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add `count` observations that sum to `total`. A mean without observations is left out of `to_floats`."""
        self._add(name, Entry("mean", total, count))

    def sum(self, name: str, value: Number) -> None:
        """Add to a total."""
        self._add(name, Entry("sum", value))

    def max(self, name: str, value: Number) -> None:
        """Keep the largest value."""
        self._add(name, Entry("max", value))

    def _add(self, name: str, new: Entry) -> None:
        old = self.entries.get(name)
        if old is None:
            self.entries[name] = Entry(new.kind, new.total, new.count)
            return
        assert old.kind == new.kind, f"{name} is a {old.kind} and a {new.kind}"
        if new.kind == "max":
            old.total = _largest(old.total, new.total)
        else:
            old.total, old.count = old.total + new.total, old.count + new.count

    def merge(self, others: "Iterable[Metrics]") -> "Metrics":
        """Add the entries of others to these; returns itself."""
        for other in others:
            for name, entry in other.entries.items():
                self._add(name, entry)
        return self

    def fetched(self) -> "Metrics":
        """The same with plain floats: one transfer from the device, ready to be sent to another process."""
        numbers = [number for entry in self.entries.values() for number in (entry.total, entry.count)]
        tensors = [number.detach().double().reshape(()) for number in numbers if isinstance(number, Tensor)]
        values = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else [])
        floats = iter([next(values) if isinstance(number, Tensor) else float(number) for number in numbers])
        plain = Metrics()
        plain.entries = {name: Entry(entry.kind, next(floats), next(floats)) for name, entry in self.entries.items()}
        return plain

    def to_floats(self, derived: Mapping[str, Derived] = MappingProxyType({})) -> dict[str, float]:
        """The values of a log line, by name.

        Args:
            derived: metrics beside `DERIVED` that are computed from merged ones, by name.
        """
        plain = self.fetched().entries.items()
        floats = {
            name: float(entry.total / entry.count) if entry.kind == "mean" else float(entry.total)
            for name, entry in plain
            if entry.kind != "mean" or entry.count
        }
        for name, (inputs, function) in {**DERIVED, **derived}.items():
            if all(needed in floats for needed in inputs):
                floats[name] = function(*(floats[needed] for needed in inputs))
        return floats
