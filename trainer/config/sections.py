"""Components named in YAML: `{name: x, key: value, ...}`. `llmquest_rl/loader.py` lists the forms of a name.

The other keys are validated before anything starts: against the class `Config(Options)` of the component's
module, or against the parameters of a user's function.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator, model_serializer, model_validator
from pydantic.fields import FieldInfo

from llmquest_rl.data.datasets import DATASETS
from llmquest_rl.data.tasks import TASKS
from llmquest_rl.loader import ComponentKind, absolute_name
from llmquest_rl.objectives import OBJECTIVES
from llmquest_rl.options import NoOptions, Options, options_class
from rollout import ENGINES


class Component(BaseModel):
    """A section whose other keys are options of the component that `name` selects."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    kind: ClassVar[ComponentKind]

    name: str
    """A built-in, or your own: `path/file.py` or `package.module`, with `:function` where one function is enough."""

    _options: Options = PrivateAttr(default_factory=NoOptions)

    @property
    def options(self) -> Any:
        """The validated options: all keys but `name`."""
        return self._options

    @property
    def module(self) -> ModuleType:
        """The component's module, imported."""
        return self.kind.module(self.name)

    @property
    def function(self) -> Callable[..., Any]:
        """The user's function if `name` has a colon, else the first function of the component's module."""
        return self.kind.function(self.name)

    @field_validator("name")
    @classmethod
    def _make_absolute(cls, name: str) -> str:
        return absolute_name(name)

    @model_validator(mode="after")
    def _validate_options(self) -> "Component":
        self._options = options_class(self.kind, self.name)(**(self.model_extra or {}))
        return self

    @model_serializer(mode="plain")
    def _resolved(self) -> dict[str, Any]:
        options = self._options.model_dump(mode="json")
        return {"name": self.name} | {key: value for key, value in options.items() if key != "name"}


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the section, or of the list's items, that a field holds; None for plain values."""
    candidates: list[Any] = [field.annotation]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        candidates += get_args(candidate)
    return None


class TaskSection(Component):
    """The source of prompts and gold answers."""

    kind: ClassVar[ComponentKind] = TASKS


class DatasetSection(Component):
    """The source of supervised sequences."""

    kind: ClassVar[ComponentKind] = DATASETS


class ObjectiveSection(Component):
    """The training loss."""

    kind: ClassVar[ComponentKind] = OBJECTIVES


class EngineSection(Component):
    """The engine that samples completions."""

    kind: ClassVar[ComponentKind] = ENGINES
