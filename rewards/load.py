"""Find a reward function, call it with what its signature accepts, and check what it returns."""

import importlib
import importlib.util
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.config import RewardConfig, unknown_key_message
from rewards.types import GradeItem, RewardFunction

OWN_ARGUMENTS = ("prompt", "completion", "answer")
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardError(ValueError):
    """A reward that cannot be run at all: not found, not importable, or in want of a column. Found before the start."""


class InvalidReturnError(ValueError):
    """A reward returned something that is no reward."""


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its options bound."""

    name: str
    function: RewardFunction
    bound: dict[str, Any]
    """Options from the configuration."""
    accepted: frozenset[str]
    required: frozenset[str]
    """Arguments without a default that options do not fill."""
    takes_all: bool
    """It has `**kwargs`: every column is passed."""

    def __call__(self, item: GradeItem) -> Any:
        """Call the function for one item; an async function gives its coroutine.

        Raises:
            RewardError: an argument is no column of this item.
        """
        values = available_arguments(item, verl=is_verl_form(self.accepted))
        missing = self.required - values.keys()
        if missing:
            raise RewardError(missing_message(self.name, missing, values))
        wanted = values if self.takes_all else {name: values[name] for name in self.accepted & values.keys()}
        return self.function(**{**wanted, **self.bound})


def is_verl_form(arguments: Iterable[str]) -> bool:
    """Whether these are the arguments of `compute_score(data_source, solution_str, ground_truth, extra_info)`."""
    return {"solution_str", "ground_truth"} <= set(arguments)


def available_arguments(item: GradeItem, verl: bool) -> dict[str, Any]:
    """Every keyword argument that the item can fill, in our naming and, if asked, in verl's."""
    values = {**item.columns, "prompt": item.prompt, "completion": item.completion, "answer": item.answer}
    if verl:
        values |= {"solution_str": item.completion, "ground_truth": item.answer}
        values.setdefault("data_source", "")
        values.setdefault("extra_info", item.columns)
    return values


def missing_message(name: str, missing: Iterable[str], available: Iterable[str]) -> str:
    """Names the arguments that nothing fills, and what there is."""
    wanted = ", ".join(f"`{argument}`" for argument in sorted(missing))
    return f"reward `{name}` needs {wanted}, but the columns are: {', '.join(sorted(available))}"


def load_reward(config: RewardConfig) -> LoadedReward:
    """Import the function that the configuration names and bind its options.

    Raises:
        RewardError: it cannot be imported, is no function, or has no argument for an option; the message says which.
    """
    function = _find(config)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward `{config.name}`: {config.function} has no readable signature ({error})") from error
    positional = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if positional:
        raise RewardError(f"reward `{config.name}` is called by keyword: remove the `/` after {', '.join(positional)}")
    accepted = frozenset(name for name, p in parameters.items() if p.kind in _KEYWORD)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    bound = {"config": config.builtin_config()} if config.is_builtin else config.options
    for option in bound:
        if option not in accepted and not takes_all:
            raise RewardError(unknown_key_message(f"reward `{config.name}`: argument", option, accepted))
    no_default = {name for name in accepted if parameters[name].default is inspect.Parameter.empty}
    return LoadedReward(config.name, function, bound, accepted, frozenset(no_default - bound.keys()), takes_all)


def _find(config: RewardConfig) -> Callable[..., Any]:
    target, _, attribute = config.function.rpartition(":")
    target, attribute = (target, attribute) if target else (f"rewards.builtin.{attribute}", "reward")
    try:
        module = _import_file(Path(target)) if target.endswith(".py") else _import_module(target)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise RewardError(f"reward `{config.name}`: importing {target}: {type(error).__name__}: {error}") from error
    function: object = getattr(module, attribute, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(unknown_key_message(f"reward `{config.name}`: in {target} the function", attribute, known))
    return function


def _import_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    """Import a file under a name of its own; its folder joins the path, so that it can import its neighbours."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} does not end in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_return(name: str, returned: Any) -> dict[str, float | None]:
    """What a reward returned, as parts by log name: `{name: value}`, and `name/component` for each one of a dict.

    A dict's value is its key `score` if it has one (the others are only logged), else the sum of its components.
    A component that is None does not apply; a dict of nothing else does not apply as a whole.

    Raises:
        InvalidReturnError: neither a finite number, nor a dict of such numbers by name, nor None.
    """
    if not isinstance(returned, dict):
        return {name: _number(name, returned)}
    if not returned or not all(isinstance(key, str) for key in returned):
        raise InvalidReturnError(f"reward `{name}` returned {returned!r:.200}: a dict needs names (str) as keys")
    components = {key: _number(f"{name}/{key}", value) for key, value in returned.items()}
    known = [value for value in components.values() if value is not None]
    value = components["score"] if "score" in components else sum(known) if known else None
    return {name: value, **{f"{name}/{key}": component for key, component in components.items()}}


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise InvalidReturnError(
            f"reward `{name}` returned {value!r:.200} ({kind}): a reward is called for one completion and returns "
            "a number, a dict of numbers by name, or None"
        )
    number = float(value)
    if not math.isfinite(number):
        raise InvalidReturnError(f"reward `{name}` returned {number}: a reward is finite")
    return number
