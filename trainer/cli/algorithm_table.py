"""The tables that `llmquest-rl algorithms` prints: one line for each preset row, with its cells."""

from rich.table import Table
from rich.text import Text

from llmquest_rl.algorithms.cells import CELLS, SURROGATES
from llmquest_rl.algorithms.preference import method as preference
from llmquest_rl.algorithms.preference import presets as preference_presets
from llmquest_rl.algorithms.presets import ROWS, Algorithm, resolve

TABLE_WIDTH = 303
"""Width in characters at which each row fits on one line; a narrower terminal would wrap them."""


def algorithm_table() -> Table:
    """The rows of `llmquest_rl/algorithms/presets.py`, each with its cells, their settings, and its paper."""
    table = Table("name", "advantage", "ratio", "surrogate", "aggregation", "KL", "lengths", "paper", box=None)
    for name, row in ROWS.items():
        algorithm = resolve(name)
        cells = (
            _advantage(algorithm),
            _ratio(algorithm),
            _surrogate(algorithm),
            _variant(algorithm, "aggregation"),
            _kl(algorithm),
            _lengths(algorithm),
        )
        table.add_row(*map(Text, (name, *cells, row.paper)))
    return table


def preference_table() -> Table:
    """The rows of `llmquest_rl/algorithms/preference/presets.py` with their cells, settings and papers."""
    table = Table("name", "margin", "reference", "link", "log-prob of the chosen", "paper", box=None)
    for name, row in preference_presets.ROWS.items():
        method = preference_presets.resolve(name)
        weight = "" if method.pair_weight == 1 else f"{method.pair_weight:g} x "
        link = f"{weight}{preference.CELLS['link'][method.link].describe(method.link, method)}"
        nll = f"{method.nll_weight:g}, mean by {method.nll_mean}" if method.nll_weight else "none"
        cells = (method.margin, "yes" if method.needs_reference else "no", link, nll)
        table.add_row(*map(Text, (name, *cells, row.paper)))
    return table


def _variant(algorithm: Algorithm, cell: str) -> str:
    """The name in a cell, with its settings."""
    name: str = getattr(algorithm, cell)
    return CELLS[cell][name].describe(name, algorithm)


def _advantage(algorithm: Algorithm) -> str:
    parts = [
        _variant(algorithm, "advantage"),
        *([_variant(algorithm, "normalization")] if algorithm.normalization != "none" else []),
        *(["by reward"] if algorithm.decoupled_rewards else []),
        *(["dynamic sampling"] if algorithm.dynamic_sampling else []),
        *([_variant(algorithm, "credit")] if algorithm.credit != "uniform" else []),
    ]
    return ", ".join(parts)


def _surrogate(algorithm: Algorithm) -> str:
    surrogate = _variant(algorithm, "surrogate")
    return (
        surrogate if algorithm.covariance == "none" else f"{surrogate}, covariance {_variant(algorithm, 'covariance')}"
    )


def _ratio(algorithm: Algorithm) -> str:
    ratio = _ratio_to_old_policy(algorithm)
    if algorithm.is_correction == Algorithm.model_fields["is_correction"].default:
        return ratio
    return f"{ratio}; {_variant(algorithm, 'is_correction')}"


def _ratio_to_old_policy(algorithm: Algorithm) -> str:
    if not SURROGATES[algorithm.surrogate].has_ratio:
        return "none"
    ratio = _variant(algorithm, "ratio")
    return ratio if algorithm.old_policy == "learner" else f"{ratio} to engine"


def _kl(algorithm: Algorithm) -> str:
    return f"{_variant(algorithm, 'kl')} {algorithm.beta:g}" if algorithm.beta else "none"


def _lengths(algorithm: Algorithm) -> str:
    parts = [
        *([_variant(algorithm, "length_penalty")] if algorithm.length_penalty != "none" else []),
        *(["overlong filter"] if algorithm.overlong_filter else []),
    ]
    return ", ".join(parts) or "none"
