"""The arguments of a reward function: those that it accepts, those that it needs, and those that options fill."""

import ast
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquest_rl.loader import did_you_mean, failing_line

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Arguments:
    """The keyword arguments of a function."""

    accepted: frozenset[str]
    required: frozenset[str]
    """Arguments without a default."""
    takes_all: bool
    """Whether the function has `**kwargs`."""


def arguments_of(function: Callable[..., Any]) -> Arguments:
    """The keyword arguments of a function.

    Raises:
        ValueError: the signature cannot be read, or an argument cannot be given by keyword.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"it has no readable signature ({error})") from error
    positional = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if positional:
        raise ValueError(f"it is called by keyword: remove the `/` after {', '.join(positional)}")
    accepted = frozenset(name for name, p in parameters.items() if p.kind in _KEYWORD)
    required = frozenset(name for name in accepted if parameters[name].default is inspect.Parameter.empty)
    return Arguments(accepted, required, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()))


def declared_arguments(file: Path, name: str) -> Arguments | None:
    """The arguments of a function of a file that is not executed: a reward's file may end or hang its process.

    Returns:
        None if they are known only after the file was executed: the function is decorated, imported or computed.

    Raises:
        ValueError: the file is no Python, or has no such function. The message gives the line, or similar names.
    """
    try:
        statements = ast.parse(file.read_bytes(), str(file)).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be imported: {failing_line(error)}") from error
    functions = {node.name: node for node in statements if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if name not in functions:
        if any(not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Expr) for node in statements):
            return None  # another statement may make it
        raise ValueError(f"{file} has no function {name!r}{did_you_mean(name, functions)}")
    found = functions[name]
    parts = found.args
    if found.decorator_list or parts.posonlyargs:
        return None
    keyword = [*parts.args, *parts.kwonlyargs]
    optional = len(parts.defaults)
    required = [a.arg for a in parts.args[: len(parts.args) - optional]]
    required += [a.arg for a, default in zip(parts.kwonlyargs, parts.kw_defaults, strict=True) if default is None]
    return Arguments(frozenset(a.arg for a in keyword), frozenset(required), parts.kwarg is not None)


def check_options(arguments: Arguments, options: Collection[str], other_keys: Collection[str]) -> None:
    """Check that a function has an argument for every option.

    Args:
        arguments: the function's arguments.
        options: names of the options.
        other_keys: the keys that a reward has beside its options, for a hint.

    Raises:
        ValueError: an option is not an argument; the message names those that resemble it.
    """
    for option in options:
        if option not in arguments.accepted and not arguments.takes_all:
            hint = did_you_mean(option, sorted({*arguments.accepted, *other_keys}))
            raise ValueError(f"it has no argument `{option}`{hint}")
