"""The table of algorithms as it is printed: presets by their cells, one line each."""

from rich.table import Table
from rich.text import Text

from llmquest_rl.algorithms.presets import PAPERS, PRESETS, Algorithm, resolve

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
    return "none" if row.surrogate == "log_prob" else row.ratio


def _surrogate(row: Algorithm) -> str:
    numbers = {
        "clip": f" {row.clip_low:g} / {row.clip_high:g}",
        "clipped_weight": f" {row.clip_low:g} / {row.clip_high:g}",
        "soft_gate": f" {row.tau_positive:g} / {row.tau_negative:g}",
    }
    return row.surrogate + numbers.get(row.surrogate, "")


def _kl(row: Algorithm) -> str:
    return f"{row.kl} {row.beta:g}" if row.beta else "none"


def _lengths(row: Algorithm) -> str:
    parts = [
        *([row.length_penalty] if row.length_penalty != "none" else []),
        *(["overlong filter"] if row.overlong_filter else []),
    ]
    return ", ".join(parts) or "none"
