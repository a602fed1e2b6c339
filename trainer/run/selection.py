"""The choice of the best checkpoint: by a metric, minus a multiple of the KL, among those whose KL is small enough.

The KL to the reference model tells how far a policy has moved from where its reward can be trusted. Gao et al. 2023
(arXiv:2210.10760) measure how the true reward first rises with it and then falls.
"""

import math
from collections.abc import Mapping
from typing import Literal

from trainer.run.checkpoint import Best

KL_METRICS = ("policy/kl_sequence", "train/kl")
"""Metrics with the KL per completion, in nats; a run has at most one of them."""


def best_score(
    metrics: Mapping[str, float], metric: str | None, mode: Literal["max", "min"], kl_coef: float, max_kl: float | None
) -> Best | None:
    """The value by which a checkpoint competes to be the best; None = it does not compete.

    Args:
        metrics: the metrics of the checkpoint's step.
        metric: the metric that decides; None = no checkpoint is the best.
        mode: whether large or small values of the metric are good.
        kl_coef: factor of the KL, which counts against the checkpoint.
        max_kl: the largest KL with which a checkpoint competes; None = no limit.
    """
    value = metrics.get(metric or "")
    if metric is None or value is None:
        return None
    if not kl_coef and max_kl is None:
        return Best(metric, value, mode)
    kl = next((metrics[key] for key in KL_METRICS if key in metrics), math.nan)  # NaN: it trained on no completion
    if not math.isfinite(kl) or (max_kl is not None and kl > max_kl):
        return None
    penalty = kl_coef * kl if mode == "max" else -kl_coef * kl
    return Best(f"{metric} {'-' if mode == 'max' else '+'} {kl_coef:g} KL", value - penalty, mode)
