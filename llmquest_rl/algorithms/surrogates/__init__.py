"""Surrogates: the loss of each token. A surrogate `foo` is the file `llmquest_rl/algorithms/surrogates/foo.py`.

The file has a function `loss(tokens)`, or `loss(tokens, settings)` with a class of its own settings, and ends with
`SURROGATE = Surrogate(loss, ...)`. It may import `ratios` and `variant`, and no other file changes.
All tensors here are `[targets]`.
`cells` finds the files; objectives may import this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

from pydantic import Field, NonNegativeFloat

from llmquest_rl.algorithms.variant import Row, Variant
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(NamedTuple):
    """The arguments of a surrogate."""

    ratio: Tensor
    """Importance ratio of the current to the old policy, above 0, with gradient."""
    logprobs: Tensor
    """Log-probs under the current policy, with gradient."""
    old_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    """Number of the sequence that each target belongs to."""


class Cuts(NamedTuple):
    """Masks of the tokens that a bound cut, bool."""

    low: Tensor
    """Tokens that the lower bound cut."""
    high: Tensor
    """Tokens that the upper bound cut."""


class Bounds(Options):
    """Settings of surrogates that bound the ratio, its logarithm, or a divergence."""

    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Lower bound. Ratios are clipped at 1 - clip_low where the advantage is negative (`clipped_weight`: everywhere).
    `geometric_clip` clips log-ratios at -clip_low. `binary_tv` and `binary_kl` cut tokens whose divergence is larger
    than this."""
    clip_high: NonNegativeFloat = 0.2
    """Upper bound. Ratios are clipped at 1 + clip_high where the advantage is positive (`clipped_weight`: everywhere).
    `geometric_clip` clips log-ratios at clip_high. `binary_tv` and `binary_kl` cut tokens whose divergence is larger
    than this."""


SHOW_BOUNDS = " {clip_low:g} / {clip_high:g}"


SurrogateFunction: TypeAlias = "Callable[[Tokens], Tensor]"


@dataclass(frozen=True, slots=True)
class Surrogate(Variant[SurrogateFunction]):
    """A loss of tokens `[targets]`, with a gradient, and its properties."""

    cuts: Callable[[Tokens, Any], Cuts] | None = None
    """The tokens that the bounds cut, for the metrics `policy/clip_*`; None = the surrogate has no bound."""
    has_ratio: bool = True
    """Whether the loss depends on the ratio. Without it a step's data may serve one update only."""
    own_gradient: bool = False
    """Whether the loss of a token has the gradient of its own log-prob alone, even if the ratio is of the sequence."""
    mixes_tokens: bool = False
    """Whether the loss of a token has gradients of the other tokens of its sequence, even if the ratio is its own."""
    rows: Mapping[str, Row] = field(default_factory=dict)
    """Rows of the table of algorithms that come with this surrogate, by name, in addition to those of `presets.py`."""


def by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """`positive` where the advantage is above 0, `negative` elsewhere."""
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)


def within(tokens: Tokens, cuts: Cuts) -> Tensor:
    """-r A of the tokens that are not cut, 0 for the others."""
    low, high = cuts
    return (-tokens.ratio * tokens.advantages).masked_fill(low | high, 0.0)
