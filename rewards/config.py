"""What the user configures: which rewards, with which weights, and the limits they run under. No torch, no Ray."""

from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from llmquest_rl.loader import absolute_name, did_you_mean, is_users_own, locate
from llmquest_rl.options import Options, options_class
from rewards.builtin import REWARDS


class RewardConfig(Options):
    """One reward: `{name: exact_number, weight: 1.0, tolerance: 0.01}` or `{function: my.py:reward, weight: 0.5}`.

    Every further key is an option of the reward: of a built-in, a field of the class `Config` in its file; of a
    function of your own, a keyword argument.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    """The label in logs, unique in the list. Default: the function's name. Alone, it names a built-in reward."""
    function: str
    """A built-in reward (`exact_number`), `module:function` or `path/file.py:function`. Default: `name`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the total; 0 = only logged."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """`name` and `function` stand in for each other; a file's path becomes absolute: any process finds it."""
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
            raise ValueError(f"reward `{self.name}`: `{self.function}` should end in `:function`")
        return self

    @property
    def is_builtin(self) -> bool:
        return not is_users_own(self.function)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside name, function and weight."""
        return dict(self.model_extra or {})

    def builtin_config(self) -> Options:
        """The typed options of a built-in reward.

        Raises:
            ValueError: no such reward, no such option, or an option of the wrong type.
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
    """How rewards are run."""

    workers: int = Field(default=1, ge=1)
    """Graders (with `cluster: ray` one actor each); the items of a step are shared out among them."""
    processes: int = Field(default=2, ge=1)
    """Worker processes of each grader that grade at the same time; one more stands by, warmed up."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Seconds for one reward of one item; then its process is killed and the item is unscored (`timeout`)."""
    memory_mb: int = Field(default=1024, ge=16)
    """MiB by which one item may grow its worker process; beyond that it is unscored (`memory`)."""
    max_unscored_share: float = Field(default=0.2, ge=0, le=1)
    """The run stops when a larger share of a step's completions is unscored because a reward failed."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds that a worker process may take to import the rewards."""


def check_names(rewards: list[RewardConfig]) -> None:
    """The labels in logs must differ.

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
