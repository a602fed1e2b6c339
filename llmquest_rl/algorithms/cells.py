"""The cells of an algorithm, and the variants that each of them can name."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from llmquest_rl.algorithms import surrogates
from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import Surrogate
from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.options import Options

SURROGATES: dict[str, Surrogate] = {
    file.name: import_module(f"{surrogates.__name__}.{file.name}").SURROGATE
    for file in iter_modules(surrogates.__path__)
}
"""Every file of the folder `surrogates`, by name."""

CELLS: dict[str, Mapping[str, Variant[Any]]] = {
    "advantage": ADVANTAGES,
    "normalization": NORMALIZATIONS,
    "length_penalty": LENGTH_PENALTIES,
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "aggregation": AGGREGATIONS,
    "kl": KL_ESTIMATORS,
    "is_correction": CORRECTIONS,
}
"""The variants of each cell by name."""


def settings_of_variants(shared: type[Options]) -> list[type[Options]]:
    """The settings classes of all variants, from which an algorithm inherits together with `shared`.

    Raises:
        TypeError: two of these classes, or one of them and `shared`, declare a setting or a validator of the same name.
    """
    variants = [variant for table in CELLS.values() for variant in table.values()]
    found = dict.fromkeys(variant.settings for variant in variants if variant.settings is not None)
    bases = [one for one in found if not any(issubclass(other, one) for other in found if other is not one)]
    declared: dict[str, type] = {}
    for base in (*bases, shared):
        for name in (*base.model_fields, *base.__pydantic_decorators__.model_validators):
            owner = next(one for one in base.__mro__ if name in (vars(one) | vars(one).get("__annotations__", {})))
            if declared.setdefault(name, owner) is not owner:
                places = " and ".join(one.__module__ for one in (declared[name], owner))
                raise TypeError(f"{places} both declare {name!r}: rename one of them, or let both use one class")
    return bases
