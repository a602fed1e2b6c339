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
    chosen = restrained(groups, algorithm)
    total = 0.0
    for group, group_weights, group_chosen in zip(groups, weights, chosen, strict=True):
        for sequence, weight, tokens in zip(group, group_weights, group_chosen, strict=True):
            total += weight * sum(sequence_terms(sequence, algorithm, tokens))
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


def sequence_terms(s: Sequence, algorithm: Algorithm, restrained: set[int]) -> list[float]:
    """The loss of each token."""
    if algorithm.old_policy == "engine":
        s = replace(s, old=s.rollout)
    advantages = [float(a) for a in s.advantages]
    if algorithm.beta > 0 and algorithm.kl_in == "reward":
        for t in range(len(advantages)):
            to_end = sum(kl(algorithm.kl, s.old[j], s.reference[j]) for j in range(t, len(advantages)))
            advantages[t] -= algorithm.beta * to_end
    advantages = [a * f for a, f in zip(advantages, credit(s, advantages, algorithm), strict=True)]
    factors = correction(s, algorithm)
    uncertain = most_uncertain(s.entropies, algorithm.top_entropy_fraction)
    terms = []
    for t, advantage in enumerate(advantages):
        value = surrogate(s, t, advantages, algorithm) * factors[t]
        too_far = algorithm.off_policy_delta is not None and np.mean(s.rollout - s.fixed) > algorithm.off_policy_delta
        left_out = algorithm.covariance == "clip" and t in restrained
        if (too_far and advantage < 0) or t not in uncertain or left_out:
            value = 0.0
        if algorithm.beta > 0 and algorithm.kl_in == "loss":
            weight = np.exp(s.new[t]) / np.exp(s.old[t]) if algorithm.kl_unbiased else 1.0
            value += algorithm.beta * weight * kl(algorithm.kl, s.new[t], s.reference[t])
        if algorithm.covariance == "kl" and t in restrained:
            value += algorithm.cov_kl * abs(s.new[t] - s.old[t])
        terms.append(value - algorithm.entropy_bonus * s.entropies[t])
    return terms


def restrained(groups: list[list[Sequence]], algorithm: Algorithm) -> list[list[set[int]]]:
    """Places of the tokens that Clip-Cov or KL-Cov chooses. Clip-Cov's choice is random unless its fraction is 1."""
    flat = [(s.rollout[t], s.advantages[t]) for group in groups for s in group for t in range(len(s.new))]
    logprobs, advantages = np.array(flat, dtype=np.float64).reshape(-1, 2).T
    covariances = (logprobs - np.mean(logprobs)) * (advantages - np.mean(advantages)) if flat else np.zeros(0)
    count = max(1, int(algorithm.cov_fraction * len(flat)))
    band = [i for i, c in enumerate(covariances) if algorithm.cov_low < c < algorithm.cov_high]
    largest = [i for i in np.argsort(-covariances, kind="stable")[:count] if covariances[i] > 0]
    assert algorithm.covariance != "clip" or len(band) <= count, "set cov_fraction to 1: the choice is random"
    chosen = {"none": set(), "clip": set(band), "kl": set(largest)}[algorithm.covariance]
    place, places = 0, []
    for group in groups:
        places.append([])
        for s in group:
            places[-1].append({t for t in range(len(s.new)) if place + t in chosen})
            place += len(s.new)
    return places


def credit(s: Sequence, advantages: list[float], algorithm: Algorithm) -> list[float]:
    """The factor of each token's advantage: FIPO's sum over later tokens."""
    n, gamma = len(s.new), 0.5 ** (1 / algorithm.future_half_life)
    if algorithm.credit == "uniform":
        return [1.0] * n
    ratios = [float(np.exp(a) / np.exp(b)) for a, b in zip(s.fixed, s.old, strict=True)]
    counted = [0.0 if r > algorithm.future_max_ratio else float(np.log(r)) for r in ratios]
    factors = []
    for t in range(n):
        future = sum(gamma ** (k - t) * counted[k] for k in range(t, n))
        factor = min(max(float(np.exp(future)), algorithm.future_low), algorithm.future_high)
        factors.append(min(factor, 1.0) if advantages[t] < 0 and ratios[t] > algorithm.future_max_ratio else factor)
    return factors


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


def shift_penalty(o: Token) -> float:
    """DRPO: the importance-weighted gradient, and a quadratic penalty on the ratio that is weighted by p_old."""
    p_old = np.exp(o.sequence.old[o.place])
    return float(-o.a * o.r + abs(o.a) * p_old * (o.r - 1) ** 2 / (2 * o.settings.shift_limit))


EQUATIONS: dict[str, Callable[[Token], float]] = {
    "clip": clip,
    "geometric_clip": geometric_clip,
    "soft_gate": soft_gate,
    "clipped_weight": clipped_weight,
    "gamma_weight": gamma_weight,
    "binary_tv": binary,
    "binary_kl": binary,
    "log_prob": lambda o: -o.a * o.logprob,
    "unclipped": lambda o: -o.a * o.r,
    "shift_penalty": shift_penalty,
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
    "shift_limit": st.sampled_from([0.15, 12.5]),
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
    p, q = np.exp(s.rollout), np.exp(s.old)
    tv, kl = abs(p - q), binary_kl(p, q)
    kept = {
        "token_binary_kl": np.maximum(kl, binary_kl(q, p)),
        "token_binary_tv": tv,
        "sequence_binary_kl": np.full(n, kl.mean()),
        "sequence_binary_tv": np.full(n, tv.mean()),
    }
    if algorithm.is_correction in kept:
        small = kept[algorithm.is_correction] <= algorithm.divergence_limit
        return [r if keep else 0.0 for r, keep in zip(tokens, small, strict=True)]
    return {
        "token_truncate": [min(max(r, low), high) for r in tokens],
        "token_mask": [r if kept else 0.0 for r, kept in zip(tokens, inside, strict=True)],
        "sequence_truncate": [min(max(whole, low), high)] * n,
        "sequence_mask": [whole if low <= whole <= high else 0.0] * n,
        "geometric_mask": [float(low <= geometric <= high)] * n,
        "reject": [float(all(inside))] * n,
    }[algorithm.is_correction]


def binary_kl(p: Vector, q: Vector) -> Vector:
    """KL(p || q) of "this token or another"."""
    return np.asarray(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


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
