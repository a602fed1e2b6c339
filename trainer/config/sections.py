"""Components named in YAML: `{name: x, key: value, ...}`, where x is a file of the component's package.

Nothing is registered. `name: gsm8k` in the task section is the file `llmquest_rl/data/tasks/gsm8k.py`; a name with a
colon, `module:function` or `path/to/file.py:function`, is a user's own code. The keys beside `name` are validated
against the class `Config(Options)` of that file (or else the function's parameters) before anything starts.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, create_model, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from llmquest_rl.options import Options


class NoOptions(Options):
    """What a component without a `Config` class accepts: nothing beside its name."""


class Component(BaseModel):
    """A section whose keys beside `name` belong to the component that `name` points to."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    package: ClassVar[str]
    entry: ClassVar[str] = ""
    """The function of the component's file that users may point to directly, e.g. `load`."""

    name: str
    """A file of the component's package, or the user's own `module:function` or `path/file.py:function`."""

    _options: Options = PrivateAttr(default_factory=NoOptions)

    @property
    def options(self) -> Any:
        """The validated `Config` of the component's file."""
        return self._options

    @property
    def module(self) -> ModuleType:
        """The component's file, imported."""
        return find_module(self.package, self.name)

    @property
    def function(self) -> Callable[..., Any]:
        """The user's function when `name` has a colon, else the file's entry function."""
        return getattr(self.module, self.name.partition(":")[2] or self.entry)  # type: ignore[no-any-return]

    @model_validator(mode="after")
    def _validate_options(self) -> "Component":
        try:
            options = options_class(self.package, self.name)
        except (ImportError, AttributeError) as error:
            raise PydanticCustomError("component", "{reason}", {"reason": str(error)}) from error
        self._options = options(**(self.model_extra or {}))
        return self

    @model_serializer(mode="plain")
    def _resolved(self) -> dict[str, Any]:
        options = self._options.model_dump(mode="json")
        return {"name": self.name} | {key: value for key, value in options.items() if key != "name"}


def component_names(package: str) -> list[str]:
    """The names that a component package offers: its files."""
    paths = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))


def options_class(package: str, name: str) -> type[Options]:
    """The class `Config` of a component's file.

    Raises:
        ImportError: see `find_module`.
    """
    module = find_module(package, name)
    function = getattr(module, name.partition(":")[2]) if ":" in name else None
    found: type[Options] = getattr(module, "Config", _parameters(function) if function else NoOptions)
    return found


def _parameters(function: Callable[..., Any]) -> type[Options]:
    """Options made from a user's function: its parameters, but for `seed`, which the run gives."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "seed" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model("Parameters", __base__=Options, **fields)


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the section, or of the list's items, that a field holds; None for plain values."""
    candidates: list[Any] = [field.annotation]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        candidates += get_args(candidate)
    return None


def find_module(package: str, name: str) -> ModuleType:
    """Import the file that a component name points to.

    Raises:
        ImportError: no such file, or it needs a package that is not installed; the message says which and what to do.
    """
    location = name.partition(":")[0]
    if location.endswith(".py"):
        return _import_path(Path(location))
    if ":" in name:
        return importlib.import_module(location)
    known = component_names(package)
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise ImportError(f"nothing is called {name!r} in {package}; {hint}")
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name!r} needs the package {error.name!r}, which is not installed: run `make setup`"
        ) from error


def _import_path(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"there is no file {path} (relative paths start at {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TaskSection(Component):
    """Where prompts and gold answers come from."""

    package: ClassVar[str] = "llmquest_rl.data.tasks"
    entry: ClassVar[str] = "load"


class DatasetSection(Component):
    """Where supervised sequences come from."""

    package: ClassVar[str] = "llmquest_rl.data.datasets"
    entry: ClassVar[str] = "load"


class ObjectiveSection(Component):
    """Which loss a batch is given."""

    package: ClassVar[str] = "llmquest_rl.objectives"


class EngineSection(Component):
    """What samples completions."""

    package: ClassVar[str] = "rollout.engines"
