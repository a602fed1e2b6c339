"""The whole policy loss in NumPy float64, as loops over sequences and tokens, written from the papers' equations.

Wherever an equation stops the gradient, `fixed` log-probs are used instead of `new` ones, so that central differences
in `new` are the gradient. A surrogate is an entry of `EQUATIONS`, and each of its own settings one of `SETTINGS`: all
tests against equations read them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
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


@dataclass(frozen=True)
class Token:
    """One token, as the equation of a surrogate sees it."""

    r: float
    """Its ratio."""
    r_fixed: float
    """Its ratio, without a gradient."""
    logprob: float
    a: float
    """Its advantage."""
    settings: Algorithm
    sequence: Sequence
    place: int
    advantages: list[float]
    """Those of the whole sequence."""

    def by_sign(self, name: str) -> float:
        """The setting of tokens with this sign of the advantage."""
        return float(getattr(self.settings, f"{name}_{'positive' if self.a > 0 else 'negative'}"))


def surrogate(s: Sequence, t: int, advantages: list[float], algorithm: Algorithm) -> float:
    """The loss of token t, before its correction."""
    fixed = ratio(replace(s, new=s.fixed), t, algorithm.ratio)
    token = Token(ratio(s, t, algorithm.ratio), fixed, s.new[t], advantages[t], algorithm, s, t, advantages)
    return float(EQUATIONS[algorithm.surrogate](token))


def clip(o: Token) -> float:
    """PPO's clip with DAPO's bounds, and the dual bound."""
    low, high = 1 - o.settings.clip_low, 1 + o.settings.clip_high
    top = np.inf if o.settings.dual_clip is None else o.settings.dual_clip
    return -o.a * (min(o.r, high) if o.a >= 0 else min(max(o.r, low), top))


def geometric_clip(o: Token) -> float:
    """GMPO's objective but for its |A|: the clipped ratios of all tokens, multiplied, and the root of their number."""
    low, high = np.exp(-o.settings.clip_low), np.exp(o.settings.clip_high)
    ratios = [ratio(o.sequence, t, o.settings.ratio) for t in range(len(o.advantages))]
    clipped = [min(r, high) if a > 0 else max(r, low) for r, a in zip(ratios, o.advantages, strict=True)]
    return float(-o.a * np.prod(clipped) ** (1 / len(clipped)))


def soft_gate(o: Token) -> float:
    """SAPO's gate."""
    tau = o.by_sign("tau")
    return float(-o.a * 4 / tau / (1 + np.exp(-tau * (o.r - 1))))


def clipped_weight(o: Token) -> float:
    """CISPO's weight of log pi."""
    return -o.a * min(max(o.r_fixed, 1 - o.settings.clip_low), 1 + o.settings.clip_high) * o.logprob


def gamma_weight(o: Token) -> float:
    """VESPO's weight of log pi."""
    return float(-o.a * o.r_fixed ** o.by_sign("power") * np.exp(o.by_sign("decay") * (1 - o.r_fixed)) * o.logprob)


def binary(o: Token) -> float:
    """DPPO's equation 12 with 13 or 14: nothing where too far already, and about to go further."""
    new, old = np.exp(o.sequence.fixed[o.place]), np.exp(o.sequence.old[o.place])
    divergence = {
        "binary_tv": abs(new - old),
        "binary_kl": old * np.log(old / new) + (1 - old) * np.log((1 - old) / (1 - new)),
    }[o.settings.surrogate]
    further = (o.a > 0 and new > old) or (o.a < 0 and new < old)
    beyond = further and divergence > (o.settings.clip_high if o.a > 0 else o.settings.clip_low)
    return 0.0 if beyond else -o.a * o.r


EQUATIONS: dict[str, Callable[[Token], float]] = {
    "clip": clip,
    "geometric_clip": geometric_clip,
    "soft_gate": soft_gate,
    "clipped_weight": clipped_weight,
    "gamma_weight": gamma_weight,
    "binary_tv": binary,
    "binary_kl": binary,
    "log_prob": lambda o: -o.a * o.logprob,
}
"""The loss of a token with each surrogate."""
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "clip_low": st.sampled_from([0.0, 3e-4, 0.2, 1.0]),
    "clip_high": st.sampled_from([0.0, 4e-4, 0.28, 4.0]),
    "dual_clip": st.sampled_from([None, 6.0]),
    "tau_positive": st.floats(0.2, 3.0),
    "tau_negative": st.floats(0.2, 3.0),
    "power_positive": st.floats(0.5, 4.0),
    "power_negative": st.floats(0.5, 4.0),
    "decay_positive": st.floats(0.5, 4.0),
    "decay_negative": st.floats(0.5, 4.0),
}
"""Random values of the settings that surrogates read."""


def known_rows() -> list[str]:
    """Names of the presets whose surrogate has an equation here."""
    return sorted(name for name in PRESETS if resolve(name).surrogate in EQUATIONS)


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
