"""The options of components: the base class of every section, and the class that belongs to a component's name.

Unknown keys are errors, values are frozen, and docstrings become the reference.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from llmquest_rl.loader import ComponentError, ComponentKind, absolute_name, did_you_mean, users_code, users_function


class Options(BaseModel):
    """One section of the configuration tree.

    A field's docstring (the string literal under it) states its unit and its reason; `docs/configuration.md` is
    made from these docstrings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class NoOptions(Options):
    """The options of a module without a class `Config`: it accepts no key but its name."""


class FunctionOptions(Options):
    """Options made from the parameters of a user's function. They are pickled as the function's name and values."""

    function_name: ClassVar[str]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.function_name, dict(self))


def options_class(kind: ComponentKind, name: str) -> type[Options]:
    """The options of a component: the class `Config` of its module, or the parameters of a user's function.

    Raises:
        ComponentError: the component cannot be loaded, or its options cannot be read.
    """
    module = kind.module(name)
    if ":" in name:
        return _function_options(name)
    found: object = getattr(module, "Config", NoOptions)
    if not (isinstance(found, type) and issubclass(found, Options)):
        raise ComponentError(f"{module.__file__}: `Config` must be a class derived from llmquest_rl.options.Options")
    return found


@cache
def _function_options(name: str) -> type[FunctionOptions]:
    """One class for each function, with a field for each parameter but `seed`, which the run gives."""
    function = users_function(name)
    fields: dict[str, Any] = {}
    try:
        for key, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if key != "seed" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
                fields[key] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
        made = create_model("Parameters", __base__=FunctionOptions, **fields)
    except Exception as error:  # annotations are evaluated, and pydantic may not know a type
        raise ComponentError(
            f"the parameters of {name} cannot be read as options: {type(error).__name__}: {error}"
        ) from error
    made.function_name = name
    return made


def checked_options(kind: ComponentKind, name: str, values: Mapping[str, Any]) -> Options:
    """The options of a component, from plain values.

    Raises:
        ValueError: an option does not exist or has the wrong type. The message is one sentence for each of them.
        ComponentError: the component cannot be loaded.
    """
    known = options_class(kind, name)
    try:
        return known(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_wrong(name, part, known) for part in error.errors())) from error


def checked_component(kind: ComponentKind, section: Mapping[str, Any], example: str) -> dict[str, Any]:
    """A component that is an option of another one: its section with checked options, and an absolute path of its file.

    Raises:
        ValueError: it has no name, or an option does not exist or has the wrong type.
        ComponentError: the component cannot be loaded.
    """
    if not isinstance(section.get("name"), str):
        raise ValueError(f"{kind.noun} needs a `name`, e.g. {example}")
    named = {**section, "name": absolute_name(section["name"])}
    checked_options(kind, named["name"], {key: value for key, value in named.items() if key != "name"})
    return named


def _wrong(name: str, error: ErrorDetails, known: type[Options]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"`{name}` has no option `{key}`{did_you_mean(key, known.model_fields)}"
    return f"`{name}`: {key}: {error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"


def call_users_function(name: str, function: Callable[..., Any], options: Options, seed: int) -> Any:
    """Call a user's function with its options as keyword arguments, and with `seed` if it has such a parameter.

    Raises:
        ComponentError: the function raised an exception; the message names its line.
    """
    keywords: dict[str, Any] = {key: getattr(options, key) for key in type(options).model_fields}
    if "seed" in inspect.signature(function).parameters:
        keywords["seed"] = seed
    with users_code(name):
        return function(**keywords)


def _restore(name: str, values: dict[str, Any]) -> FunctionOptions:
    return _function_options(name)(**values)
