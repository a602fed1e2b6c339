"""The table of preference methods: each method of the literature is a row of cells, and every cell can be replaced."""

from collections.abc import Mapping
from typing import Any

from llmquest_rl.algorithms.preference.method import Method
from llmquest_rl.algorithms.variant import Row
from llmquest_rl.loader import did_you_mean

ROWS: dict[str, Row] = {
    "dpo": Row("DPO, arXiv 2305.18290", {"margin": "log_ratio", "link": "sigmoid", "beta": 0.1}),
    "cdpo": Row(
        "cDPO, E. Mitchell 2023",
        {"margin": "log_ratio", "link": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
    ),
    "robust_dpo": Row(
        "robust DPO, arXiv 2403.00409",
        {"margin": "log_ratio", "link": "robust", "beta": 0.1, "label_smoothing": 0.1},
    ),
    "ipo": Row("IPO, arXiv 2310.12036", {"margin": "log_ratio_mean", "link": "squared", "beta": 0.1}),
    "hinge": Row(
        "SLiC-HF, arXiv 2305.10425, with RSO's margin, arXiv 2309.06657",
        {"margin": "log_ratio", "link": "hinge", "beta": 0.1},
    ),
    "simpo": Row(
        "SimPO, arXiv 2405.14734",
        {"margin": "logprob_mean", "link": "sigmoid", "beta": 2.0, "target_margin": 1.0},
    ),
    "orpo": Row(
        "ORPO, arXiv 2403.07691",
        {"margin": "log_odds", "link": "sigmoid", "beta": 1.0, "pair_weight": 0.1, "nll_weight": 1.0},
    ),
    "cpo": Row(
        "CPO, arXiv 2401.08417",
        {"margin": "logprob", "link": "sigmoid", "beta": 0.1, "nll_weight": 1.0},
    ),
    "kto": Row("KTO, arXiv 2402.01306", {"margin": "log_ratio", "link": "kto", "beta": 0.1}),
    "apo_zero": Row("APO, arXiv 2408.06266", {"margin": "log_ratio", "link": "apo_zero", "beta": 0.1}),
    "apo_down": Row("APO, arXiv 2408.06266", {"margin": "log_ratio", "link": "apo_down", "beta": 0.1}),
    "sppo": Row("SPPO, arXiv 2405.00675", {"margin": "log_ratio", "link": "sppo", "beta": 1e-3}),
    "discopop": Row(
        "DiscoPOP, arXiv 2406.08414", {"margin": "log_ratio", "link": "discopop", "beta": 0.05, "tau": 0.05}
    ),
    "rpo": Row(
        "iterative RPO, arXiv 2404.19733",
        {"margin": "log_ratio", "link": "sigmoid", "beta": 0.1, "nll_weight": 1.0, "nll_mean": "answer"},
    ),
}
"""The rows by name."""

PRESETS: dict[str, Mapping[str, Any]] = {name: row.cells for name, row in ROWS.items()}
"""Cells and settings of each row by name."""


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The row `name` with some cells or settings replaced.

    Raises:
        ValueError: there is no such row, no such cell, or a cell does not take the value.
    """
    if name not in PRESETS:
        raise ValueError(f"no preference method is called {name!r}{did_you_mean(name, PRESETS, list_all=True)}")
    return Method(**{**PRESETS[name], **(overrides or {})})
