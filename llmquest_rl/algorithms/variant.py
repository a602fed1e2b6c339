"""One choice for a cell of an algorithm: a function, the settings that it alone reads, and how both are printed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import Field

from llmquest_rl.loader import did_you_mean
from llmquest_rl.options import Options

Function = TypeVar("Function", bound=Callable[..., Any])

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""A factor of 0 or more."""
PositiveFinite = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A number above 0 in a formula that infinity would make NaN."""


@dataclass(frozen=True, slots=True)
class Variant(Generic[Function]):
    """A function that a cell can name, with its settings.

    The cells extend this class by flags that the rules of a configuration read.
    """

    function: Callable[..., Any]
    """The formula. If the variant has settings, they are its last argument, `settings`."""
    settings: type[Options] | None = None
    """The settings that the function reads. Every `Algorithm` has their fields; None = there are none."""
    shows: str = ""
    """Format string of the settings, printed behind the variant's name in the table of algorithms."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(self.settings.model_fields) if self.settings is not None else ()

    def configured(self, algorithm: Options) -> Function:
        """The function with its settings taken from `algorithm`."""
        function: Any = self.function if self.settings is None else partial(self.function, settings=algorithm)
        return function  # type: ignore[no-any-return]

    def describe(self, name: str, algorithm: Options) -> str:
        """The variant's name and its settings in `algorithm`, as one table cell."""
        return name + self.shows.format_map(dict(algorithm))


class Row(NamedTuple):
    """An algorithm of the literature: the cells and settings that define it."""

    paper: str
    """Its name in the literature, and an arXiv number."""
    cells: Mapping[str, Any]
    """Keys of the section `algorithm`; keys that are left out have their defaults."""


Cells = Mapping[str, Mapping[str, Variant[Any]]]
"""The variants of each cell by name."""


def settings_of_variants(cells: Cells, shared: type[Options]) -> list[type[Options]]:
    """The settings classes of all variants of the cells, from which a row inherits together with `shared`.

    Raises:
        TypeError: two of these classes, or one of them and `shared`, declare a setting or a validator of the same name.
    """
    variants = [variant for table in cells.values() for variant in table.values()]
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


def cell_field(cells: Cells, name: str, default: str, meaning: str) -> Any:
    """The field of a cell in a settings class. Its description ends with the names that it takes."""
    names = ", ".join(f"`{variant}`" for variant in cells[name])
    return Field(default, description=f"{meaning} One of {names}.")


def known_variant(cells: Cells, cell: str, name: str) -> str:
    """The name of a variant of a cell.

    Raises:
        ValueError: the cell has no such variant; the message names those that it has.
    """
    if name not in cells[cell]:
        raise ValueError(f"there is no {name!r}{did_you_mean(name, cells[cell], list_all=True)}")
    return name
