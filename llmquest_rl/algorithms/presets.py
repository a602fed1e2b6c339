"""The table of algorithms: each algorithm of the literature is a row of cells, and every cell can be replaced."""

from collections.abc import Mapping
from typing import Any

from llmquest_rl.algorithms.algorithm import Algorithm
from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.later_rows import LATER_ROWS
from llmquest_rl.algorithms.variant import Row
from llmquest_rl.loader import did_you_mean

__all__ = ["PRESETS", "ROWS", "Algorithm", "resolve"]

LITERATURE: dict[str, Row] = {
    "grpo": Row(
        "DeepSeekMath, arXiv 2402.03300",
        {
            "advantage": "group_mean_std",
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "sequence_mean",
            "kl": "k3",
            "beta": 0.04,
        },
    ),
    "dr_grpo": Row(
        "Dr. GRPO, arXiv 2503.20783",
        {
            "advantage": "group_mean",
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "max_tokens_mean",
            "beta": 0.0,
        },
    ),
    "dapo": Row(
        "DAPO, arXiv 2503.14476",
        {
            "advantage": "group_mean_std",
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "aggregation": "token_mean",
            "length_penalty": "soft_overlong",
            "overlong_buffer": 0.2,
            "overlong_filter": True,
            "dynamic_sampling": True,
            "beta": 0.0,
        },
    ),
    "gspo": Row(
        "GSPO, arXiv 2507.18071",
        {
            "advantage": "group_mean_std",
            "ratio": "sequence",
            "surrogate": "clip",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean",
            "beta": 0.0,
        },
    ),
    "gspo_token": Row(
        "GSPO, arXiv 2507.18071",
        {
            "advantage": "group_mean_std",
            "ratio": "sequence_token",
            "surrogate": "clip",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean",
            "beta": 0.0,
        },
    ),
    "luspo": Row(
        "LUSPO, arXiv 2602.05261",
        {
            "advantage": "group_mean_std",
            "ratio": "sequence",
            "surrogate": "clip",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_sum",
            "beta": 0.0,
        },
    ),
    "sapo": Row(
        "SAPO, arXiv 2511.20347",
        {
            "advantage": "group_mean_std",
            "ratio": "token",
            "surrogate": "soft_gate",
            "tau_positive": 1.0,
            "tau_negative": 1.05,
            "aggregation": "sequence_mean",
            "beta": 0.0,
        },
    ),
    "cispo": Row(
        "MiniMax-M1, arXiv 2506.13585; its bound from ScaleRL, arXiv 2510.13786",
        {
            "advantage": "group_mean_std",
            "ratio": "token",
            "surrogate": "clipped_weight",
            "clip_low": 1.0,
            "clip_high": 4.0,
            "aggregation": "token_mean",
            "beta": 0.0,
        },
    ),
    "gmpo": Row(
        "GMPO, arXiv 2507.20673",
        {
            "advantage": "group_mean_std",
            "ratio": "token",
            "surrogate": "geometric_clip",
            "clip_low": 0.4,
            "clip_high": 0.4,
            "aggregation": "sequence_mean",
            "beta": 0.0,
        },
    ),
    "vespo": Row(
        "VESPO, arXiv 2602.10693",
        {
            "advantage": "group_mean_std",
            "ratio": "sequence_product",
            "surrogate": "gamma_weight",
            "power_positive": 2.0,
            "power_negative": 3.0,
            "decay_positive": 3.0,
            "decay_negative": 2.0,
            "aggregation": "token_mean",
            "beta": 0.0,
        },
    ),
    "dppo": Row(
        "DPPO, arXiv 2602.04879",
        {
            "advantage": "group_mean",
            "ratio": "token",
            "old_policy": "engine",
            "surrogate": "binary_tv",
            "clip_low": 0.15,
            "clip_high": 0.15,
            "aggregation": "max_tokens_mean",
            "beta": 0.0,
        },
    ),
    "rloo": Row(
        "Back to Basics, arXiv 2402.14740",
        {
            "advantage": "leave_one_out",
            "surrogate": "log_prob",
            "aggregation": "sequence_sum",
            "kl": "k1",
            "kl_in": "reward",
            "beta": 0.0,
        },
    ),
    "reinforce": Row(
        "Back to Basics, arXiv 2402.14740",
        {
            "advantage": "reward",
            "surrogate": "log_prob",
            "aggregation": "sequence_sum",
            "kl": "k1",
            "kl_in": "reward",
            "beta": 0.0,
        },
    ),
    "reinforce_pp": Row(
        "REINFORCE++, arXiv 2501.03262",
        {
            "advantage": "reward",
            "normalization": "whiten",
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "kl": "k1",
            "kl_in": "reward",
            "beta": 0.0,
        },
    ),
    "reinforce_pp_baseline": Row(
        "REINFORCE++, arXiv 2501.03262",
        {
            "advantage": "group_mean",
            "normalization": "whiten",
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "kl": "k2",
            "beta": 0.0,
        },
    ),
    "opo": Row(
        "OPO, arXiv 2505.23585",
        {
            "advantage": "length_weighted_mean",
            "surrogate": "log_prob",
            "aggregation": "sequence_sum",
            "beta": 0.0,
        },
    ),
    "gpg": Row(
        "GPG, arXiv 2504.02546",
        {
            "advantage": "group_mean",
            "normalization": "valid_groups",
            "surrogate": "log_prob",
            "aggregation": "token_mean",
            "beta": 0.0,
        },
    ),
    "pass_at_k": Row(
        "Pass@k Training, arXiv 2508.10751",
        {
            "advantage": "pass_at_k",
            "pass_k": 4,
            "ratio": "token",
            "surrogate": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "sequence_mean",
            "beta": 0.0,
        },
    ),
}
"""The rows by name. docs/algorithms/ says where a paper also changes other parts of a run."""

ROWS: dict[str, Row] = (
    LITERATURE | LATER_ROWS | {name: row for surrogate in SURROGATES.values() for name, row in surrogate.rows.items()}
)
"""The rows above, those of `later_rows.py`, and those that are defined in the file of their surrogate."""
PRESETS: dict[str, Mapping[str, Any]] = {name: row.cells for name, row in ROWS.items()}
"""Cells and settings of each row by name."""


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Algorithm:
    """The row `name` with some cells or settings replaced.

    Raises:
        ValueError: there is no such row, no such cell, or a cell does not take the value.
    """
    if name not in PRESETS:
        raise ValueError(f"no algorithm is called {name!r}{did_you_mean(name, PRESETS)}")
    return Algorithm(**{**PRESETS[name], **(overrides or {})})
