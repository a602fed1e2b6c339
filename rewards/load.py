"""Loads a reward function, calls it with the arguments that its signature accepts, and checks its return value."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmquest_rl.loader import ComponentError
from rewards.builtin import REWARDS
from rewards.config import RewardConfig
from rewards.signature import arguments_of
from rewards.types import GradeItem, RewardFunction

OWN_ARGUMENTS = ("prompt", "completion", "answer")
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


class RewardError(ValueError):
    """A reward is not found, cannot be imported, or needs a column that the data lack. Raised before a run starts."""


class InvalidReturnError(ValueError):
    """A reward returned an invalid value."""


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its options bound."""

    name: str
    function: RewardFunction
    bound: dict[str, Any]
    """Options from the configuration, by argument."""
    accepted: frozenset[str]
    required: frozenset[str]
    """Arguments that have neither a default nor an option."""
    takes_all: bool
    """Whether the function has `**kwargs`; then every column is passed."""

    def __call__(self, item: GradeItem) -> Any:
        """Call the function for one item; an async function returns its coroutine.

        Raises:
            RewardError: the item has no column for an argument.
        """
        values = available_arguments(item, verl=is_verl_form(self.accepted))
        missing = self.required - values.keys()
        if missing:
            raise RewardError(missing_message(self.name, missing, values))
        arguments = values if self.takes_all else {name: values[name] for name in self.accepted & values.keys()}
        return self.function(**{**arguments, **self.bound})


def is_verl_form(arguments: Iterable[str]) -> bool:
    """Whether these are arguments of verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`."""
    return {"solution_str", "ground_truth"} <= set(arguments)


def available_arguments(item: GradeItem, verl: bool) -> dict[str, Any]:
    """All keyword arguments that the item provides, under our names and, if `verl`, under those of verl."""
    values = {**item.columns, "prompt": item.prompt, "completion": item.completion, "answer": item.answer}
    if verl:
        values |= {"solution_str": item.completion, "ground_truth": item.answer}
        values.setdefault("data_source", "")
        values.setdefault("extra_info", item.columns)
    return values


def missing_message(name: str, missing: Iterable[str], available: Iterable[str]) -> str:
    """The error message for missing arguments, with the existing columns."""
    needed = ", ".join(f"`{argument}`" for argument in sorted(missing))
    return f"reward `{name}` needs {needed}, but the columns are: {', '.join(sorted(available))}"


def load_reward(config: RewardConfig) -> LoadedReward:
    """Import the function that the configuration names and bind its options.

    Raises:
        RewardError: the function cannot be loaded, or has no argument for an option.
    """
    try:
        function = REWARDS.function(config.function)
    except ComponentError as error:
        raise RewardError(f"reward `{config.name}`: {error}") from error
    try:
        arguments = arguments_of(function)
    except ValueError as error:
        raise RewardError(f"reward `{config.name}`: {error}") from error
    if config.is_module:
        bound = {"config": config.module_options()} if "config" in arguments.accepted else {}
    else:
        bound = config.options
        try:
            config.check_arguments(arguments)
        except ValueError as error:
            raise RewardError(str(error)) from error
    required = arguments.required - bound.keys()
    return LoadedReward(config.name, function, bound, arguments.accepted, required, arguments.takes_all)


def read_return(name: str, returned: Any) -> dict[str, float | None]:
    """The return value of a reward as parts by name in logs: `name`, and `name/component` for the components of a dict.

    The value of a dict is its component `score` if it has one (the others are only logged), or else the sum of its
    components. A component None does not apply; if all are None, the reward does not apply.

    Raises:
        InvalidReturnError: the value is neither a finite number, nor a dict of such numbers by name, nor None.
    """
    if not isinstance(returned, dict):
        return {name: _number(name, returned)}
    if not returned or not all(isinstance(key, str) for key in returned):
        raise InvalidReturnError(f"reward `{name}` returned {returned!r:.200}: the keys of a dict must be names (str)")
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
            f"reward `{name}` returned {value!r:.200} ({kind}): a reward gets one completion and returns "
            "a number, a dict of numbers by name, or None"
        )
    number = float(value)
    if not math.isfinite(number):
        raise InvalidReturnError(f"reward `{name}` returned {number}: a reward must be finite")
    return number
