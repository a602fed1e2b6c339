"""Token sampling: temperature, min-p, top-k, top-p, and one random number per token.

The order of the filters and the tokens that they keep are those of vLLM (temperature, min-p, top-k, top-p), so both
engines sample from the same distribution. Logits have the shape `[batch, vocab]`, values per sequence `[batch]`.
"""

import math

import torch
from torch import Tensor

from llmquest_rl.types import Sampling

_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 1) as signed 64-bit integers."""


def processed_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Compute the logits `[batch, vocab]` of the distribution to sample from, in float32; -inf for dropped tokens.

    With temperature 0 the logits are unchanged: greedy decoding reports log-probs at temperature 1.
    """
    scores = logits.float()
    if sampling.temperature in (0.0, 1.0):
        return scores if sampling.temperature == 0 else _filter(scores, sampling)
    return _filter(scores / sampling.temperature, sampling)


def _filter(scores: Tensor, sampling: Sampling) -> Tensor:
    if sampling.min_p > 0:
        scores = keep_min_p(scores, sampling.min_p)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = keep_top_p(scores, sampling.top_p)
    return scores


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less than `min_p` times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082)."""
    floor = logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < floor, -math.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` most likely tokens, and ties with the last of them (Fan et al. 2018, arXiv:1805.04833)."""
    kth = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens with a total probability of `p` (Holtzman et al. 2019, arXiv:1904.09751)."""
    probs = logits.softmax(-1)
    # Tokens below (1 - p) / vocab sum to less than 1 - p, so all of them are dropped: only the others need sorting.
    candidates = int((probs >= (1 - p) / probs.shape[-1]).sum(-1).max())
    largest, tokens = probs.topk(max(candidates, 1), dim=-1)
    likelier = largest.double().cumsum(-1) - largest
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, tokens, likelier < p)
    return logits.masked_fill(~kept, -math.inf)


def sample_tokens(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per sequence by inverting the cumulative distribution at a uniform random number.

    It uses one random number per token, not one per vocabulary entry. That is cheap, and the number can be a function
    of (seed, completion, position) alone.

    Args:
        logits: Logits `[batch, vocab]`, any float dtype.
        sampling: Temperature and filters.
        uniforms: Uniform numbers in [0, 1), float64 `[batch]`; ignored at temperature 0.

    Returns:
        Token ids `[batch]`, and their log-probs under the distribution sampled from, float32 `[batch]`. If the logits
        of a row contain NaN or +inf, its log-prob is NaN and its token is meaningless.
    """
    scores = processed_logits(logits, sampling)
    top = scores.amax(-1, keepdim=True)
    cumulative = (scores - top).exp_().cumsum_(-1)
    total = cumulative[:, -1]
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        below_total = torch.nextafter(total, torch.zeros_like(total))
        threshold = torch.minimum((uniforms * total.double()).float(), below_total)
        # right=True: the first token whose cumulative weight exceeds the threshold, hence never one of weight 0
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=scores.shape[-1] - 1)  # with NaN no weight exceeds the threshold
    chosen = scores.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, chosen - top.squeeze(-1) - total.log()


def stream_keys(seed: int, n: int) -> Tensor:
    """Keys of the random streams of a request's completions, long `[n]`; each depends on (seed, completion) only."""
    signed = (seed + 2**63) % 2**64 - 2**63
    return _mix(_mix(torch.tensor([signed])) + torch.arange(n) * _GOLDEN)


def stream_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Random number at `positions` `[batch]` of the streams `keys` `[batch]`: float64 `[batch]` in [0, 1).

    SplitMix64 is a counter-based generator here: it has no state, and gives the same numbers on every device.
    """
    bits = _shift(_mix(keys + positions * _GOLDEN), 11)
    return bits.double().mul_(2.0**-53)


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function; products wrap around modulo 2^64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
