"""The whole policy loss in NumPy float64, as loops over sequences and tokens, written from the papers' equations.

Wherever an equation stops the gradient, `fixed` log-probs are used instead of `new` ones, so that central differences
in `new` are the gradient.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup

Vector = NDArray[np.float64]


@dataclass
class Sequence:
    """One completion: everything [tokens]."""

    new: Vector
    fixed: Vector
    old: Vector
    rollout: Vector
    reference: Vector
    advantages: Vector
    entropies: Vector


def loss(groups: list[list[Sequence]], algorithm: Algorithm, max_tokens: int) -> float:
    """Sum over all tokens of weight x loss."""
    lengths = [[len(sequence.new) for sequence in group] for group in groups]
    weights = token_weights(lengths, algorithm.aggregation, max_tokens)
    total = 0.0
    for group, group_weights in zip(groups, weights, strict=True):
        for sequence, weight in zip(group, group_weights, strict=True):
            total += weight * sum(sequence_terms(sequence, algorithm))
    return total


def token_weights(lengths: list[list[int]], aggregation: str, max_tokens: int) -> list[list[float]]:
    """The weight of one token of each sequence."""
    flat = [n for group in lengths for n in group]
    return {
        "sequence_mean": [[1 / (n * len(flat)) for n in group] for group in lengths],
        "sequence_sum": [[1 / len(flat) for _ in group] for group in lengths],
        "token_mean": [[1 / sum(flat) for _ in group] for group in lengths],
        "prompt_mean": [[1 / (sum(group) * len(lengths)) for _ in group] for group in lengths],
        "max_tokens_mean": [[1 / (len(flat) * max_tokens) for _ in group] for group in lengths],
    }[aggregation]


def sequence_terms(s: Sequence, algorithm: Algorithm) -> list[float]:
    """The loss of each token."""
    if algorithm.old_policy == "engine":
        s = replace(s, old=s.rollout)
    advantages = [float(a) for a in s.advantages]
    if algorithm.beta > 0 and algorithm.kl_in == "reward":
        for t in range(len(advantages)):
            to_end = sum(kl(algorithm.kl, s.old[j], s.reference[j]) for j in range(t, len(advantages)))
            advantages[t] -= algorithm.beta * to_end
    factors = correction(s, algorithm)
    uncertain = most_uncertain(s.entropies, algorithm.top_entropy_fraction)
    terms = []
    for t, advantage in enumerate(advantages):
        value = surrogate(s, t, advantages, algorithm) * factors[t]
        too_far = algorithm.off_policy_delta is not None and np.mean(s.rollout - s.fixed) > algorithm.off_policy_delta
        if (too_far and advantage < 0) or t not in uncertain:
            value = 0.0
        if algorithm.beta > 0 and algorithm.kl_in == "loss":
            weight = np.exp(s.new[t]) / np.exp(s.old[t]) if algorithm.kl_unbiased else 1.0
            value += algorithm.beta * weight * kl(algorithm.kl, s.new[t], s.reference[t])
        terms.append(value - algorithm.entropy_bonus * s.entropies[t])
    return terms


def ratio(s: Sequence, t: int, name: str) -> float:
    """r of token t."""
    n = len(s.new)
    if name == "token":
        return float(np.exp(s.new[t]) / np.exp(s.old[t]))
    if name == "sequence":
        return float(np.prod(np.exp(s.new) / np.exp(s.old)) ** (1 / n))
    if name == "sequence_token":
        value = np.prod(np.exp(s.fixed) / np.exp(s.old)) ** (1 / n)
        return float(value * np.exp(s.new[t]) / np.exp(s.fixed[t]))
    return float(np.prod(np.exp(s.new) / np.exp(s.old)))


def surrogate(s: Sequence, t: int, advantages: list[float], algorithm: Algorithm) -> float:
    """-A times: the ratio, which stops counting where a gain or a loss has gone far enough, or a weight of log pi."""
    a, r = advantages[t], ratio(s, t, algorithm.ratio)
    fixed = ratio(replace(s, new=s.fixed), t, algorithm.ratio)
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    top = np.inf if algorithm.dual_clip is None else algorithm.dual_clip
    sign = "positive" if a > 0 else "negative"
    tau, power, decay = (getattr(algorithm, f"{name}_{sign}") for name in ("tau", "power", "decay"))
    factor = {
        "clip": lambda: min(r, high) if a >= 0 else min(max(r, low), top),
        "geometric_clip": lambda: geometric_mean(s, advantages, algorithm),
        "soft_gate": lambda: 4 / tau / (1 + np.exp(-tau * (r - 1))),
        "clipped_weight": lambda: min(max(fixed, low), high) * s.new[t],
        "gamma_weight": lambda: fixed**power * np.exp(decay * (1 - fixed)) * s.new[t],
        "binary_tv": lambda: 0.0 if beyond(s, t, a, algorithm) else r,
        "binary_kl": lambda: 0.0 if beyond(s, t, a, algorithm) else r,
        "log_prob": lambda: s.new[t],
    }[algorithm.surrogate]
    return -a * float(factor())


def geometric_mean(s: Sequence, advantages: list[float], algorithm: Algorithm) -> float:
    """GMPO's objective but for its |A|: the clipped ratios of all tokens, multiplied, and the root of their number."""
    low, high = np.exp(-algorithm.clip_low), np.exp(algorithm.clip_high)
    ratios = [ratio(s, t, algorithm.ratio) for t in range(len(s.new))]
    clipped = [min(r, high) if a > 0 else max(r, low) for r, a in zip(ratios, advantages, strict=True)]
    return float(np.prod(clipped) ** (1 / len(clipped)))


def beyond(s: Sequence, t: int, advantage: float, algorithm: Algorithm) -> bool:
    """DPPO's equation 12 with 13 or 14: too far already, and about to go further."""
    new, old = np.exp(s.fixed[t]), np.exp(s.old[t])
    divergence = {
        "binary_tv": abs(new - old),
        "binary_kl": old * np.log(old / new) + (1 - old) * np.log((1 - old) / (1 - new)),
    }[algorithm.surrogate]
    further = (advantage > 0 and new > old) or (advantage < 0 and new < old)
    return bool(further and divergence > (algorithm.clip_high if advantage > 0 else algorithm.clip_low))


def kl(name: str, policy: float, reference: float) -> float:
    """Schulman's estimators."""
    r = np.exp(reference) / np.exp(policy)
    return float({"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r), "abs": abs(np.log(r))}[name])


def correction(s: Sequence, algorithm: Algorithm) -> list[float]:
    """The factor of each token for the engine's rounding, which a ratio to the engine holds already."""
    n, low, high = len(s.old), algorithm.tis_floor, algorithm.tis_cap
    if high is None or algorithm.old_policy == "engine":
        return [1.0] * n
    tokens = [float(np.exp(a) / np.exp(b)) for a, b in zip(s.old, s.rollout, strict=True)]
    whole = float(np.prod(tokens))
    geometric = whole ** (1 / n)
    inside = [low <= r <= high for r in tokens]
    return {
        "token_truncate": [min(max(r, low), high) for r in tokens],
        "token_mask": [r if kept else 0.0 for r, kept in zip(tokens, inside, strict=True)],
        "sequence_truncate": [min(max(whole, low), high)] * n,
        "sequence_mask": [whole if low <= whole <= high else 0.0] * n,
        "geometric_mask": [float(low <= geometric <= high)] * n,
        "reject": [float(all(inside))] * n,
    }[algorithm.is_correction]


def most_uncertain(entropies: Vector, share: float) -> set[int]:
    """Places of the largest entropies, at least one."""
    count = max(1, int(np.ceil(round(share * len(entropies), 6))))
    return set(sorted(range(len(entropies)), key=lambda t: (-entropies[t], t))[:count])


def sequences(
    sequence_groups: list[SequenceGroup], new: Vector, fixed: Vector, old: Vector, reference: Vector, entropies: Vector
) -> list[list[Sequence]]:
    """Packed arrays [targets] cut into the completions of `sequence_groups`, which carry the other token fields."""
    groups, start = [], 0
    for sequence_group in sequence_groups:
        group = []
        for i, completion in enumerate(sequence_group.completions):
            part = slice(start, start + len(completion))
            start += len(completion)
            group.append(
                Sequence(
                    new[part],
                    fixed[part],
                    old[part],
                    np.asarray(sequence_group.token_fields["rollout_logprobs"][i]),
                    reference[part],
                    np.asarray(sequence_group.token_fields["advantages"][i]),
                    entropies[part],
                )
            )
        groups.append(group)
    return groups
