"""The configuration of rewards: their names, options and weights, and the limits for their worker processes."""

from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from llmquest_rl.loader import absolute_name, did_you_mean, is_users_own, locate
from llmquest_rl.options import Options, options_class
from rewards.builtin import REWARDS


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
    """A built-in reward (`exact_number`), `module:function` or `path/file.py:function`. It may be left out if `name` is
    a built-in."""
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
        name = data.get("name") or function.rpartition(":")[2]
        return {**data, "function": absolute_name(function), "name": name}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_builtin:
            self.builtin_config()
        elif not locate(self.function)[1]:
            raise ValueError(
                f"reward `{self.name}`: `{self.function}` should end in `:function`, the name of the function"
            )
        return self

    @property
    def is_builtin(self) -> bool:
        return not is_users_own(self.function)

    @property
    def options(self) -> dict[str, Any]:
        """The options: all keys but `name`, `function` and `weight`."""
        return dict(self.model_extra or {})

    def builtin_config(self) -> Options:
        """The typed options of a built-in reward.

        Raises:
            ValueError: the reward or an option does not exist, or an option has the wrong type.
        """
        config_class = options_class(REWARDS, self.function)
        for key in self.options:
            if key not in config_class.model_fields:
                hint = did_you_mean(key, config_class.model_fields)
                raise ValueError(f"reward `{self.function}` has no option `{key}`{hint}")
        try:
            return config_class(**self.options)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            )
            raise ValueError(f"reward `{self.function}`: {problems}") from error


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
