"""What is minimised for each token, and which tokens a bound took out of the gradient. All shapes are [targets]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llmquest_rl.algorithms.log_ratios import LOG_LIMIT, bounded_exp, sequence_mean
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(NamedTuple):
    """What the surrogates are functions of."""

    ratio: Tensor
    """Of the current to the old policy, above 0, with gradient."""
    logprobs: Tensor
    """Of the current policy, with gradient."""
    old_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor


class Bounds(NamedTuple):
    """The numbers of the surrogates."""

    low: float = 0.2
    """Ratios count down to 1 - low; log-ratios to -low; divergences up to low."""
    high: float = 0.2
    """Ratios count up to 1 + high; log-ratios and divergences to high."""
    dual: float | None = None
    """Where the advantage is negative, ratios count up to this; None = without limit."""
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    power_positive: float = 2.0
    power_negative: float = 3.0
    decay_positive: float = 3.0
    decay_negative: float = 2.0


def clip(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and with a dual bound c, where A < 0, -max(that minimum, c A).

    PPO, arXiv 1707.06347, equation 7; with two bounds: DAPO, arXiv 2503.14476, equation 10; the dual one: arXiv
    1912.09729, its dual-clip PPO.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - bounds.low, 1 + bounds.high) * advantages)
    if bounds.dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -bounds.dual * advantages), losses)


def geometric_clip(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-A exp(mean of c over the sequence), c = min(log r, high) where A > 0, max(log r, -low) elsewhere (GMPO, arXiv
    2507.20673, its objective).

    Tokens are clipped one by one, before the mean: one that is cut loses its own gradient and no other's.
    """
    log_ratio = tokens.ratio.log()
    clipped = torch.where(tokens.advantages > 0, log_ratio.clamp(max=bounds.high), log_ratio.clamp(min=-bounds.low))
    return -tokens.advantages * bounded_exp(sequence_mean(clipped, tokens.sequence_ids))


def soft_gate(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with tau+ where A > 0 and tau- elsewhere (SAPO, arXiv 2511.20347).

    Its gradient is the policy gradient's times r 4 p (1 - p) with p the sigmoid: 1 at r = 1, fading on both sides.
    """
    tau = _by_sign(tokens.advantages, bounds.tau_positive, bounds.tau_negative)
    return -(4 / tau) * torch.sigmoid(tau * (tokens.ratio - 1)) * tokens.advantages


def clipped_weight(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-sg[clip(r, 1 - low, 1 + high)] A log pi: no token loses its gradient (CISPO, arXiv 2506.13585, eq. 4-5)."""
    weight = tokens.ratio.detach().clamp(1 - bounds.low, 1 + bounds.high)
    return -weight * tokens.advantages * tokens.logprobs


def gamma_weight(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-sg[r^k exp(lambda (1 - r))] A log pi, with k+, lambda+ where A > 0 and k-, lambda- elsewhere (VESPO, arXiv
    2602.10693, equation 20, where r is the ratio of the whole sequence).

    The weight is 1 at r = 1, fades as r^k towards 0 and as exp(-lambda r) upwards, and is largest at r = k / lambda.
    """
    ratio = tokens.ratio.detach()
    power = _by_sign(tokens.advantages, bounds.power_positive, bounds.power_negative)
    decay = _by_sign(tokens.advantages, bounds.decay_positive, bounds.decay_negative)
    weight = (power * ratio.log() + decay * (1 - ratio)).clamp(max=LOG_LIMIT).exp()
    return -weight * tokens.advantages * tokens.logprobs


def binary_tv(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-r A, and 0 where the token's probability has changed by more than low (high) in the direction in which A < 0
    (A > 0) drives it: the total variation of "this token or another" (DPPO, arXiv 2602.04879, equations 12, 13)."""
    return _within(tokens, tv_cuts(tokens, bounds))


def binary_kl(tokens: Tokens, bounds: Bounds) -> Tensor:
    """The same with KL(old || current) of "this token or another" (DPPO, arXiv 2602.04879, equations 12, 14)."""
    return _within(tokens, kl_cuts(tokens, bounds))


def log_prob(tokens: Tokens, bounds: Bounds) -> Tensor:
    """-A log pi: the policy gradient itself (Williams 1992), right for samples of the current policy only."""
    return -tokens.advantages * tokens.logprobs


SURROGATES: dict[str, Callable[[Tokens, Bounds], Tensor]] = {
    "clip": clip,
    "geometric_clip": geometric_clip,
    "soft_gate": soft_gate,
    "clipped_weight": clipped_weight,
    "gamma_weight": gamma_weight,
    "binary_tv": binary_tv,
    "binary_kl": binary_kl,
    "log_prob": log_prob,
}

ON_POLICY = frozenset({"log_prob"})
"""Surrogates without a ratio: a step's data may serve one update only."""

OWN_GRADIENT = frozenset({"clipped_weight", "gamma_weight", "log_prob"})
"""Surrogates in which a token's loss has the gradient of its own log-prob alone, whatever the ratio is of."""

Cuts: TypeAlias = "tuple[Tensor, Tensor]"
"""Which tokens were cut at the lower bound, and at the upper one."""


def clip_cuts(tokens: Tokens, bounds: Bounds) -> Cuts:
    """Tokens without a gradient: the ratio is below (above) its bound, and the advantage drives it further."""
    ratio, advantages = tokens.ratio, tokens.advantages
    low = (ratio < 1 - bounds.low) & (advantages < 0)
    high = (ratio > 1 + bounds.high) & (advantages > 0)
    return low, high if bounds.dual is None else high | ((ratio > bounds.dual) & (advantages < 0))


def log_cuts(tokens: Tokens, bounds: Bounds) -> Cuts:
    """The same for bounds of the log-ratio."""
    log_ratio = tokens.ratio.log()
    return (log_ratio < -bounds.low) & (tokens.advantages < 0), (log_ratio > bounds.high) & (tokens.advantages > 0)


def weight_cuts(tokens: Tokens, bounds: Bounds) -> Cuts:
    """Tokens whose weight was cut: they keep a gradient, a smaller (larger) one."""
    return tokens.ratio < 1 - bounds.low, tokens.ratio > 1 + bounds.high


def tv_cuts(tokens: Tokens, bounds: Bounds) -> Cuts:
    """Tokens without a gradient: they lost (gained) more probability than their bound, and are to lose (gain) more."""
    gain = tokens.logprobs.exp() - tokens.old_logprobs.exp()
    return (gain < -bounds.low) & (tokens.advantages < 0), (gain > bounds.high) & (tokens.advantages > 0)


def kl_cuts(tokens: Tokens, bounds: Bounds) -> Cuts:
    """The same for a bound of the KL between old and current policy."""
    new, old, advantages = tokens.logprobs.detach(), tokens.old_logprobs, tokens.advantages
    new_rest, old_rest = _log_complement(new), _log_complement(old)
    kl = old.exp() * (old - new) + old_rest.exp() * (old_rest - new_rest)
    return (kl > bounds.low) & (new < old) & (advantages < 0), (kl > bounds.high) & (new > old) & (advantages > 0)


CUTS: dict[str, Callable[[Tokens, Bounds], Cuts]] = {
    "clip": clip_cuts,
    "geometric_clip": log_cuts,
    "clipped_weight": weight_cuts,
    "binary_tv": tv_cuts,
    "binary_kl": kl_cuts,
}
"""Not for surrogates without a bound."""


def _by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)


def _within(tokens: Tokens, cuts: Cuts) -> Tensor:
    """-r A of the tokens that are not cut, 0 for the others."""
    low, high = cuts
    return (-tokens.ratio * tokens.advantages).masked_fill(low | high, 0.0)


def _log_complement(logprobs: Tensor) -> Tensor:
    """log(1 - p), finite also where p is rounded to 1."""
    return (-torch.expm1(logprobs)).clamp(min=torch.finfo(torch.float32).tiny).log()
