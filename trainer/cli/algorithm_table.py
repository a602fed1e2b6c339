"""The table of algorithms as it is printed: presets by their cells, one line each."""

from rich.table import Table
from rich.text import Text

from llmquest_rl.algorithms.presets import PAPERS, PRESETS, Algorithm, resolve
from llmquest_rl.algorithms.surrogates import CUTS, ON_POLICY

TABLE_WIDTH = 236
"""Columns that keep each row on one line; a narrower terminal wraps them."""


def algorithm_table() -> Table:
    """One line for each row of `llmquest_rl/algorithms/presets.py`, with what makes it that and where it comes from."""
    table = Table("name", "advantage", "ratio", "surrogate", "aggregation", "KL", "lengths", "paper", box=None)
    for name in PRESETS:
        row = resolve(name)
        cells = (name, _advantage(row), _ratio(row), _surrogate(row), row.aggregation, _kl(row), _lengths(row))
        table.add_row(*map(Text, cells), Text(PAPERS[name]))
    return table


def _advantage(row: Algorithm) -> str:
    name = f"{row.advantage} (k {row.pass_k})" if row.advantage == "pass_at_k" else row.advantage
    parts = [
        name,
        *([row.normalization] if row.normalization != "none" else []),
        *(["dynamic sampling"] if row.dynamic_sampling else []),
    ]
    return ", ".join(parts)


def _ratio(row: Algorithm) -> str:
    if row.surrogate in ON_POLICY:
        return "none"
    return row.ratio if row.old_policy == "learner" else f"{row.ratio} to engine"


def _surrogate(row: Algorithm) -> str:
    power, decay = _pair(row.power_positive, row.power_negative), _pair(row.decay_positive, row.decay_negative)
    numbers = {
        **dict.fromkeys(CUTS, _pair(row.clip_low, row.clip_high)),
        "soft_gate": _pair(row.tau_positive, row.tau_negative),
        "gamma_weight": f"{power},{decay}",
    }
    return row.surrogate + numbers.get(row.surrogate, "")


def _pair(low: float, high: float) -> str:
    return f" {low:g} / {high:g}"


def _kl(row: Algorithm) -> str:
    return f"{row.kl} {row.beta:g}" if row.beta else "none"


def _lengths(row: Algorithm) -> str:
    parts = [
        *([row.length_penalty] if row.length_penalty != "none" else []),
        *(["overlong filter"] if row.overlong_filter else []),
    ]
    return ", ".join(parts) or "none"
