"""What is minimised for each token: (ratio [targets], advantage [targets], clip_low, clip_high) -> loss [targets]."""

from collections.abc import Callable

import torch
from torch import Tensor


def clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A).

    PPO, arXiv 1707.06347, equation 7; with two bounds: DAPO, arXiv 2503.14476, equation 10.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


SURROGATES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {"clip": clip}
