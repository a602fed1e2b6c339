"""The configuration of rewards: their names, options and weights, and the limits for their worker processes."""

from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from llmquest_rl.loader import ComponentError, absolute_name, locate
from llmquest_rl.options import Options, checked_options
from rewards.builtin import REWARDS
from rewards.signature import Arguments, check_options, declared_arguments


class RewardConfig(Options):
    """One reward: `{name: exact_number, weight: 1.0, tolerance: 0.01}` or `{function: my.py:reward, weight: 0.5}`.

    Every further key is an option of the reward: for a built-in a field of the class `Config` in its file, for a
    function of your own a keyword argument.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    """The label in logs, unique in the list. With `function` it may be left out: it is then the function's name.
    Without `function` it is the name of a built-in reward."""
    function: str
    """A built-in reward (`exact_number`), `module:function` or `path/file.py:function`, or a file or module of the form
    of a built-in: `path/file.py`. It may be left out if `name` is a built-in."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the total; 0 = the reward is only logged."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Fill `name` or `function` from the other, and make a file's path absolute, so that any process finds it."""
        if not isinstance(data, dict):
            return data
        function = data.get("function", data.get("name"))
        if not isinstance(function, str) or not function:
            raise ValueError(
                "a reward needs `name` (a built-in) or `function` (module:function or path/file.py:function)"
            )
        name = data.get("name") or (function.rpartition(":")[2] if ":" in function else Path(function).stem)
        return {**data, "function": absolute_name(function), "name": name}

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Check the reward's options. The file of a function is read here, but executed in worker processes only."""
        if self.is_module:
            self.module_options()
            return self
        location, function = locate(self.function)
        arguments = declared_arguments(Path(location), function) if location.endswith(".py") else None
        if arguments is not None:
            self.check_arguments(arguments)
        return self

    def check_arguments(self, arguments: Arguments) -> None:
        """Check that the reward's function has an argument for every option.

        Raises:
            ValueError: it has not; the message names the arguments that resemble the option.
        """
        try:
            check_options(arguments, self.options, RewardConfig.model_fields)
        except ValueError as error:
            raise ValueError(f"reward `{self.name}`: {error}") from error

    @property
    def is_module(self) -> bool:
        """Whether the reward is a whole module with the function `reward`: a built-in, or a user's of the same form."""
        return ":" not in self.function

    @property
    def options(self) -> dict[str, Any]:
        """The options: all keys but `name`, `function` and `weight`."""
        return dict(self.model_extra or {})

    def module_options(self) -> Options:
        """The typed options of a reward that is a module.

        Raises:
            ValueError: the reward or an option does not exist, or an option has the wrong type.
        """
        try:
            return checked_options(REWARDS, self.function, self.options)
        except ComponentError:
            raise
        except ValueError as error:
            raise ValueError(f"reward {error}") from error


class GraderConfig(Options):
    """The processes that run rewards, and their limits."""

    workers: int = Field(default=1, ge=1)
    """Number of graders (with `cluster: ray` one actor each); the items of a step are divided among them."""
    processes: int = Field(default=2, ge=1)
    """Number of worker processes per grader that grade at the same time; one more is started as a spare."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Time limit in seconds for one reward of one item. After it the process is killed, and the item is unscored."""
    memory_mb: int = Field(default=1024, ge=16)
    """Memory limit in MiB: if one item makes its process grow by more, the item is unscored (`memory`)."""
    max_unscored_share: float = Field(default=0.2, ge=0, le=1)
    """Maximum share of a step's completions whose reward may fail; the run stops if more are unscored."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Time limit in seconds for a worker process to import the rewards."""


def check_names(rewards: list[RewardConfig]) -> None:
    """Check that the labels in logs differ.

    Raises:
        ValueError: the list is empty or two rewards share a name.
    """
    if not rewards:
        raise ValueError("no rewards are configured: give at least one, e.g. `rewards: [{name: exact_number}]`")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two rewards are called `{name}`: give one of them another `name` and keep its `function`"
            )
