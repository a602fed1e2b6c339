"""The table of algorithms: what the literature calls an algorithm is a row of cells, each of them overridable."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import SURROGATES
from llmquest_rl.options import Options


def _known(table: Mapping[str, object]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"there is no {name!r}; there are: {', '.join(table)}")
        return name

    return check


class Algorithm(Options):
    """One row: the cells of a policy-gradient algorithm."""

    advantage: Annotated[str, AfterValidator(_known(ADVANTAGES))] = "group_mean_std"
    """How a sample is compared with its group: `group_mean_std`, `group_mean`."""
    ratio: Annotated[str, AfterValidator(_known(RATIOS))] = "token"
    """Importance ratio of the current to the old policy: `token`."""
    surrogate: Annotated[str, AfterValidator(_known(SURROGATES))] = "clip"
    """What is minimised for each token: `clip`."""
    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """The ratio counts down to 1 - clip_low where the advantage is negative."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio counts up to 1 + clip_high where the advantage is positive."""
    aggregation: Annotated[str, AfterValidator(_known(AGGREGATIONS))] = "sequence_mean"
    """How token losses become one: `sequence_mean`, `token_mean`, `max_tokens_mean`."""
    kl: Annotated[str, AfterValidator(_known(KL_ESTIMATORS))] = "k3"
    """Estimator of the KL to the reference model: `k3`, `k2`, `k1`."""
    beta: NonNegativeFloat = 0.0
    """Weight of that KL in the loss; 0 = none, and no reference model is held."""
    tis_cap: PositiveFloat | None = 2.0
    """Truncated importance sampling for the engine's rounding: each token's policy loss is multiplied by
    min(pi_old / pi_engine, tis_cap), both before the step; null = no correction (the gap is logged all the same)."""


PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage": "group_mean_std",
        "ratio": "token",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean",
        "kl": "k3",
        "beta": 0.04,
    },
    "dr_grpo": {
        "advantage": "group_mean",
        "ratio": "token",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "max_tokens_mean",
        "beta": 0.0,
    },
    "dapo": {
        "advantage": "group_mean_std",
        "ratio": "token",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "beta": 0.0,
    },
}
"""grpo: DeepSeekMath, arXiv 2402.03300. dr_grpo: arXiv 2503.20783. dapo (its loss): arXiv 2503.14476."""


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Algorithm:
    """The preset row `name` with some cells replaced.

    Raises:
        ValueError: no such preset, no such cell, or a value that the cell does not take.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(PRESETS)}"
        raise ValueError(f"no algorithm is called {name!r}; {hint}")
    return Algorithm(**{**PRESETS[name], **(overrides or {})})
