"""How token losses become one number: a weight for each token, fixed on all sequences of an optimizer update at once.

Because the loss is then the plain sum of weight x token loss, the same gradient comes out whatever the microbatches,
the packing or the number of processes. Each function takes the length of every sequence of the update, in tokens, and
the longest completion allowed; it gives the weight of every token of each sequence.
"""

from collections.abc import Callable, Sequence


def sequence_mean(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """1 / (|o_i| N): mean within each sequence, then over sequences (DeepSeekMath, arXiv 2402.03300, equation 3)."""
    return [1 / (length * len(lengths)) for length in lengths]


def token_mean(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """1 / sum_i |o_i|: mean over all tokens (DAPO, arXiv 2503.14476, equation 12)."""
    return [1 / sum(lengths)] * len(lengths)


def max_tokens_mean(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """1 / (N L_max): long and short sequences weigh the same by token (Dr. GRPO, arXiv 2503.20783, listing 1)."""
    return [1 / (len(lengths) * max_tokens)] * len(lengths)


AGGREGATIONS: dict[str, Callable[[Sequence[int], int], list[float]]] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "max_tokens_mean": max_tokens_mean,
}
