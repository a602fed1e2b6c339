"""Compare our logits with those of transformers, for any checkpoint folder.

Both models run in float32 on the CPU. transformers uses its plain ("eager") attention and one sequence at a time; our
model runs all sequences in one pack, and a second time with a prompt that several continuations share.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout, SequenceGroup, collate
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.models.base import CausalLM, Model
from llmquest_rl.models.checkpoint.load_save import load_any_model
from llmquest_rl.models.config.labels import POOLING
from llmquest_rl.models.sequence_classifier import SequenceClassifier
from llmquest_rl.models.vit import ViT
from llmquest_rl.models.weight_map import hf_map

PROMPT_LENGTH = 24
CONTINUATION_LENGTHS = (1, 8, 40, 120)
"""Lengths in tokens. They are short because large models are slow on a CPU; the longest one exceeds attention windows
in tests, and the chunks of 64 tokens of linear attention."""
IMAGES = 4
"""Number of random images for an image model."""


@dataclass(frozen=True)
class ParityReport:
    """The differences between two implementations."""

    max_abs_diff: float
    """Largest absolute difference of a logit, with packed sequences."""
    max_abs_diff_shared: float
    """Largest absolute difference with a prompt computed once for several continuations; 0 for models without that."""
    max_abs_logit: float
    """Largest absolute logit, the scale of the differences."""
    positions: int
    """Number of positions, sequences or images compared, each over the whole vocabulary or all labels."""
    architecture: str
    """Name of the class in transformers."""

    @property
    def worst(self) -> float:
        """The larger of both differences, to compare with a tolerance."""
        return max(self.max_abs_diff, self.max_abs_diff_shared)


def parity(path: Path | str, seed: int = 0) -> ParityReport:
    """Compare our float32 logits with those of transformers.

    Language models run on random tokens, text classifiers on random sequences, and image models on random images.

    Args:
        path: A checkpoint folder.
        seed: Seeds the random inputs.

    Raises:
        ValueError: the folder does not load (see `load_any_model`), transformers does not have the class, or it does
            not read the scores where this model was trained to be read.
    """
    import transformers

    model = load_any_model(path, torch.float32)
    name = hf_map(model).architecture
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no class {name} to compare with")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = getattr(transformers, name).from_pretrained(path, **options).eval()
    compare = next(compare for kind, compare in COMPARISONS.items() if isinstance(model, kind))
    with torch.no_grad():
        return compare(model.eval(), theirs, seed)


def _compare_text(model: Any, theirs: Any, seed: int) -> ParityReport:
    prompt, *continuations = _random_tokens(model, seed)
    sequences = [torch.cat((prompt, continuation)) for continuation in continuations]
    expected = [theirs(sequence[None], use_cache=False).logits[0].float() for sequence in sequences]
    packed = _packed_logits(model, sequences, [-1] * len(sequences))
    shared = _packed_logits(model, [prompt, *continuations], [-1] + [0] * len(continuations))
    tails = [logits[len(prompt) :] for logits in expected]
    return _report(theirs, expected, packed, _largest_difference(shared[1:], tails) if model.shares_prompts else 0.0)


def _compare_images(model: Any, theirs: Any, seed: int) -> ParityReport:
    shape = (IMAGES, model.config.num_channels, *model.config.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return _report(theirs, [theirs(images).logits], [model.logits(images)], 0.0)


def _compare_scores(model: Any, theirs: Any, seed: int) -> ParityReport:
    if model.config.pooling == "mean":
        raise ValueError(
            f"config.json has {POOLING} 'mean': the score is the mean over the tokens of a reply. transformers ignores "
            "this field and reads the last token, so its scores differ. Only `reward_models` of a recipe reads them so"
        )
    prompt, *continuations = _random_tokens(model, seed)
    theirs.config.pad_token_id = None  # transformers would skip a last token with this id
    expected = [theirs(torch.cat((prompt, tail))[None], use_cache=False).logits for tail in continuations]
    separate = [SequenceGroup([], [[*prompt.tolist(), *tail.tolist(), 0]]) for tail in continuations]
    shared = SequenceGroup(prompt.tolist(), [[*tail.tolist(), 0] for tail in continuations])
    packed = _scores(model, separate)
    difference = _largest_difference(_scores(model, [shared]), expected) if model.shares_prompts else 0.0
    return _report(theirs, expected, packed, difference)


def _scores(model: Any, groups: list[SequenceGroup]) -> list[Tensor]:
    """Return the scores `[1, labels]` of each completion at its last token before the placeholder of the label."""
    last = [replace(group, mask=[[*[False] * (len(c) - 1), True] for c in group.completions]) for group in groups]
    return list(model(collate(last)).values.split(1))


COMPARISONS: dict[type[Model], Callable[[Any, Any, int], ParityReport]] = {
    CausalLM: _compare_text,
    SequenceClassifier: _compare_scores,
    ViT: _compare_images,
}
"""The comparison for each kind of model."""


def _report(theirs: Any, expected: list[Tensor], ours: list[Tensor], shared: float) -> ParityReport:
    return ParityReport(
        max_abs_diff=_largest_difference(ours, expected),
        max_abs_diff_shared=shared,
        max_abs_logit=max(float(logits.abs().max()) for logits in expected),
        positions=sum(len(logits) for logits in expected),
        architecture=type(theirs).__name__,
    )


def _random_tokens(model: CausalLM | SequenceClassifier, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    room = model.config.max_positions - PROMPT_LENGTH
    lengths = (PROMPT_LENGTH, *(min(length, room) for length in CONTINUATION_LENGTHS))
    return [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]


def _packed_logits(model: CausalLM, segments: list[Tensor], parents: list[int]) -> list[Tensor]:
    layout = Layout(tuple(len(segment) for segment in segments), tuple(parents))
    states = model.hidden(torch.cat(segments), layout.positions(), PackedAttention(layout, "cpu")).states
    return list(model.logits(states).split(layout.lengths))


def _largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest absolute difference; it is NaN if there is a NaN, and no NaN is within a tolerance."""
    return float(torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)]).max())
