"""The section `algorithm` of a configuration: a preset and the options that override it."""

from typing import Any, Self

from pydantic import model_validator

from llmquest_rl.algorithms.algorithm import READERS
from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
from llmquest_rl.algorithms.unused_settings import check_read


class AlgorithmSection(Algorithm):
    """A policy-gradient algorithm: a preset and any options that override it. The defaults below apply to options that
    the preset does not set; `llmquest-rl algorithms` lists those that it sets."""

    name: str = "grpo"
    """Preset, a row of `llmquest_rl/algorithms/presets.py`: `grpo`, `dr_grpo`, `dapo`, ..."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name", "grpo")
        resolve(name)
        return {**PRESETS[name], "name": name, **value}

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        check_read(self, resolve(self.name), READERS)
        return self
