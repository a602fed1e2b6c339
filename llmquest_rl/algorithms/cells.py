"""The cells of an algorithm, and the variants that each of them can name."""

from importlib import import_module
from pkgutil import iter_modules

from llmquest_rl.algorithms import surrogates
from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.covariance import COVARIANCES
from llmquest_rl.algorithms.credit import CREDITS
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import Surrogate
from llmquest_rl.algorithms.variant import Cells

SURROGATES: dict[str, Surrogate] = {
    file.name: import_module(f"{surrogates.__name__}.{file.name}").SURROGATE
    for file in iter_modules(surrogates.__path__)
}
"""Every file of the folder `surrogates`, by name."""

CELLS: Cells = {
    "advantage": ADVANTAGES,
    "normalization": NORMALIZATIONS,
    "length_penalty": LENGTH_PENALTIES,
    "credit": CREDITS,
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "aggregation": AGGREGATIONS,
    "covariance": COVARIANCES,
    "kl": KL_ESTIMATORS,
    "is_correction": CORRECTIONS,
}
"""The variants of each cell of a policy-gradient algorithm by name."""
