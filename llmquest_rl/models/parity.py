"""Our logits beside those of transformers, for any checkpoint folder: the proof that an architecture file is right.

Both run in float32 on the CPU, transformers with its plain ("eager") attention and one sequence at a time. Ours runs
all sequences in one pack and, a second time, with a prompt shared between continuations.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention import PackedAttention
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.hf import load_model

PROMPT_LENGTH = 24
CONTINUATION_LENGTHS = (1, 8, 40, 120)
"""Short on purpose, because a large model on a CPU is slow; the longest crosses windows of tests and chunks of 64."""


@dataclass(frozen=True)
class ParityReport:
    """How far two implementations are apart."""

    max_abs_diff: float
    """Largest difference of a logit in packed sequences."""
    max_abs_diff_shared: float
    """The same where a prompt is computed once for several continuations; 0 for models that do not share prompts."""
    max_abs_logit: float
    """Largest logit, to judge the differences by."""
    positions: int
    """Positions compared, each over the whole vocabulary."""
    architecture: str

    @property
    def worst(self) -> float:
        """The number that a tolerance is held against."""
        return max(self.max_abs_diff, self.max_abs_diff_shared)


def parity(path: Path | str, seed: int = 0) -> ParityReport:
    """Compare our float32 logits with transformers' on random tokens.

    Args:
        path: A checkpoint folder.
        seed: Draws the tokens.

    Raises:
        ValueError: the folder does not load here.
    """
    from transformers import AutoModelForCausalLM

    model = load_model(path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    prompt, *continuations = _random_tokens(model, seed)
    sequences = [torch.cat((prompt, continuation)) for continuation in continuations]
    with torch.no_grad():
        expected = [theirs(sequence[None]).logits[0].float() for sequence in sequences]
        packed = _packed_logits(model, sequences, [-1] * len(sequences))
        shared = _packed_logits(model, [prompt, *continuations], [-1] + [0] * len(continuations))
    tails = [logits[PROMPT_LENGTH:] for logits in expected]
    return ParityReport(
        max_abs_diff=_largest_difference(packed, expected),
        max_abs_diff_shared=_largest_difference(shared[1:], tails) if model.shares_prompts else 0.0,
        max_abs_logit=max(float(logits.abs().max()) for logits in expected),
        positions=sum(len(logits) for logits in expected),
        architecture=type(theirs).__name__,
    )


def _random_tokens(model: CausalLM, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    room = model.config.max_positions - PROMPT_LENGTH
    lengths = (PROMPT_LENGTH, *(min(length, room) for length in CONTINUATION_LENGTHS))
    return [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]


def _packed_logits(model: CausalLM, segments: list[Tensor], parents: list[int]) -> list[Tensor]:
    layout = Layout(tuple(len(segment) for segment in segments), tuple(parents))
    states = model.hidden(torch.cat(segments), layout.positions(), PackedAttention(layout, "cpu")).states
    return list(model.logits(states).split(layout.lengths))


def _largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """NaN if either holds one: a comparison with a tolerance then fails, as it should."""
    return float(torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)]).max())
