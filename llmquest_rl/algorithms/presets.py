"""The table of algorithms: what the literature calls an algorithm is a row of cells, each of them overridable."""

from collections.abc import Mapping
from typing import Any

from llmquest_rl.algorithms.algorithm import Algorithm
from llmquest_rl.loader import did_you_mean

__all__ = ["PAPERS", "PRESETS", "Algorithm", "resolve"]

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
        "length_penalty": "soft_overlong",
        "overlong_buffer": 0.2,
        "overlong_filter": True,
        "dynamic_sampling": True,
        "beta": 0.0,
    },
    "gspo": {
        "advantage": "group_mean_std",
        "ratio": "sequence",
        "surrogate": "clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
        "beta": 0.0,
    },
    "gspo_token": {
        "advantage": "group_mean_std",
        "ratio": "sequence_token",
        "surrogate": "clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
        "beta": 0.0,
    },
    "luspo": {
        "advantage": "group_mean_std",
        "ratio": "sequence",
        "surrogate": "clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_sum",
        "beta": 0.0,
    },
    "sapo": {
        "advantage": "group_mean_std",
        "ratio": "token",
        "surrogate": "soft_gate",
        "tau_positive": 1.0,
        "tau_negative": 1.05,
        "aggregation": "sequence_mean",
        "beta": 0.0,
    },
    "cispo": {
        "advantage": "group_mean_std",
        "ratio": "token",
        "surrogate": "clipped_weight",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
        "beta": 0.0,
    },
    "gmpo": {
        "advantage": "group_mean_std",
        "ratio": "token",
        "surrogate": "geometric_clip",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "sequence_mean",
        "beta": 0.0,
    },
    "vespo": {
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
    "dppo": {
        "advantage": "group_mean",
        "ratio": "token",
        "old_policy": "engine",
        "surrogate": "binary_tv",
        "clip_low": 0.15,
        "clip_high": 0.15,
        "aggregation": "max_tokens_mean",
        "beta": 0.0,
    },
    "rloo": {
        "advantage": "leave_one_out",
        "surrogate": "log_prob",
        "aggregation": "sequence_sum",
        "kl": "k1",
        "kl_in": "reward",
        "beta": 0.0,
    },
    "reinforce": {
        "advantage": "reward",
        "surrogate": "log_prob",
        "aggregation": "sequence_sum",
        "kl": "k1",
        "kl_in": "reward",
        "beta": 0.0,
    },
    "reinforce_pp": {
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
    "reinforce_pp_baseline": {
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
    "opo": {
        "advantage": "length_weighted_mean",
        "surrogate": "log_prob",
        "aggregation": "sequence_sum",
        "beta": 0.0,
    },
    "gpg": {
        "advantage": "group_mean",
        "normalization": "valid_groups",
        "surrogate": "log_prob",
        "aggregation": "token_mean",
        "beta": 0.0,
    },
    "pass_at_k": {
        "advantage": "pass_at_k",
        "pass_k": 4,
        "ratio": "token",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean",
        "beta": 0.0,
    },
}

PAPERS: dict[str, str] = {
    "grpo": "DeepSeekMath, arXiv 2402.03300",
    "dr_grpo": "Dr. GRPO, arXiv 2503.20783",
    "dapo": "DAPO, arXiv 2503.14476",
    "gspo": "GSPO, arXiv 2507.18071",
    "gspo_token": "GSPO, arXiv 2507.18071",
    "luspo": "LUSPO, arXiv 2602.05261",
    "sapo": "SAPO, arXiv 2511.20347",
    "cispo": "MiniMax-M1, arXiv 2506.13585; its bound from ScaleRL, arXiv 2510.13786",
    "gmpo": "GMPO, arXiv 2507.20673",
    "vespo": "VESPO, arXiv 2602.10693",
    "dppo": "DPPO, arXiv 2602.04879",
    "rloo": "Back to Basics, arXiv 2402.14740",
    "reinforce": "Back to Basics, arXiv 2402.14740",
    "reinforce_pp": "REINFORCE++, arXiv 2501.03262",
    "reinforce_pp_baseline": "REINFORCE++, arXiv 2501.03262",
    "opo": "OPO, arXiv 2505.23585",
    "gpg": "GPG, arXiv 2504.02546",
    "pass_at_k": "Pass@k Training, arXiv 2508.10751",
}
"""Where each row comes from. What the rows leave to other parts of a run is said in docs/algorithms/."""


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Algorithm:
    """The preset row `name` with some cells replaced.

    Raises:
        ValueError: no such preset, no such cell, or a value that the cell does not take.
    """
    if name not in PRESETS:
        raise ValueError(f"no algorithm is called {name!r}{did_you_mean(name, PRESETS)}")
    return Algorithm(**{**PRESETS[name], **(overrides or {})})
