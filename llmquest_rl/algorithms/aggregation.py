"""Aggregation of token losses: a weight for each token, fixed on all sequences of an optimizer update at once.

The loss is then the plain sum of weight x token loss, so the gradient does not depend on the microbatches, the packing
or the number of processes. Each function takes the lengths in tokens of the sequences of every group of the update, and
the maximum completion length; it returns the weight of every token of each sequence, in the same shape. Sequences
without tokens are not counted.
"""

from collections.abc import Callable, Sequence

from llmquest_rl.algorithms.variant import Variant

Lengths = Sequence[Sequence[int]]


def sequence_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (|o_i| N): mean within each sequence, then over sequences (DeepSeekMath, arXiv 2402.03300, equation 3)."""
    sequences = _num_sequences(lengths)
    return [[1 / (max(length, 1) * sequences) for length in group] for group in lengths]


def sequence_sum(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / N: sum within each sequence, then the mean over sequences: the policy gradient of whole completions.

    REINFORCE and RLOO, arXiv 2402.14740; with sequence ratios: LUSPO, arXiv 2602.05261.
    """
    return _constant(lengths, 1 / _num_sequences(lengths))


def token_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / sum_i |o_i|: mean over all tokens of the update (DAPO, arXiv 2503.14476, as its authors run it)."""
    return _constant(lengths, 1 / max(sum(map(sum, lengths)), 1))


def prompt_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """Mean over the tokens of each group, then over groups.

    This is DAPO's equation 8 taken literally, within its expectation over prompts. It was the best choice in ScaleRL,
    arXiv 2510.13786.
    """
    groups = max(sum(any(group) for group in lengths), 1)
    return [[1 / (max(sum(group), 1) * groups)] * len(group) for group in lengths]


def max_tokens_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (N L_max): a token weighs the same in long and short sequences (Dr. GRPO, arXiv 2503.20783, listing 1)."""
    return _constant(lengths, 1 / (_num_sequences(lengths) * max_tokens))


def _num_sequences(lengths: Lengths) -> int:
    return max(sum(length > 0 for group in lengths for length in group), 1)


def _constant(lengths: Lengths, weight: float) -> list[list[float]]:
    return [[weight] * len(group) for group in lengths]


class Aggregation(Variant[Callable[[Lengths, int], list[list[float]]]]):
    """The weight of every token."""


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation(sequence_mean),
    "sequence_sum": Aggregation(sequence_sum),
    "token_mean": Aggregation(token_mean),
    "prompt_mean": Aggregation(prompt_mean),
    "max_tokens_mean": Aggregation(max_tokens_mean),
}
