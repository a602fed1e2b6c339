"""The page docs/configuration.md, made from the typed tree. `trainer/cli/generated_docs.py` writes it."""

import json
import re
from collections.abc import Iterator
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from llmquest_rl.data.datasets import DATASETS
from llmquest_rl.data.tasks import TASKS
from llmquest_rl.loader import ComponentKind
from llmquest_rl.objectives import OBJECTIVES
from rewards.builtin import REWARDS
from rollout import ENGINES
from trainer.config.schema import Config
from trainer.config.sections import Component, section_class

HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")
INTRODUCTION = """# Configuration reference

This page is generated from the code by `make docs`. The texts are the docstrings of `trainer/config/schema.py` and of
the components.

A recipe is a YAML file. With `inherit: other.yaml` it starts from another recipe; that path is relative to the file.
Sections merge key by key. A list is replaced as a whole, and so is a component (such as a task) with another `name`. On
the command line `optimizer.lr=1e-5` overrides a key, and `rewards.0.weight=0.5` a key of a list item. Values are YAML.
Unknown keys are errors. Every option is checked before any process starts; `llmquest-rl train RECIPE --dry-run` checks
the data, the model files and the rewards as well.

The run folder holds the resolved configuration with every value as `config.yaml`. That file is a recipe, too.
"""
KINDS: dict[str, ComponentKind] = {
    "task: {{name: {}}}": TASKS,
    "dataset: {{name: {}}}": DATASETS,
    "objective: {{name: {}}}": OBJECTIVES,
    "engine: {{name: {}}}": ENGINES,
    "rewards: [{{name: {}}}]": REWARDS,
}
"""Kinds of components, by how a component is named in YAML."""
COMPONENTS = """## Components

Options of the built-in components. They are keys beside `name`, in the section that names the component: `data.task`,
`data.dataset`, `objective`, `rollout.engine` or an item of `rewards`. Your own code can take the place of a built-in
([Your own code](data.md#your-own-code-in-a-recipe)).
"""


def reference() -> str:
    """The complete Markdown document."""
    lines = [INTRODUCTION, "## The run", "", *HEAD, *_rows(Config, top=True)]
    for key, field in Config.model_fields.items():
        model = section_class(field)
        if model is not None:
            lines += _section(key, model)
    lines += ["", COMPONENTS.rstrip(), *_components()]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    """The lines of a section and of its subsections."""
    if issubclass(model, Component):
        return
    yield from ("", f"## {path}", "", _sentence(model), "", *HEAD, *_rows(model))
    for key, field in model.model_fields.items():
        inner = section_class(field)
        if inner is not None:
            yield from _section(f"{path}.{key}", inner)


def _components() -> Iterator[str]:
    """The options of every built-in component."""
    for title, kind in KINDS.items():
        for name in kind.names():
            yield from _component(title.format(name), kind.module(name))


def _component(title: str, module: ModuleType) -> Iterator[str]:
    yield from ("", f"### `{title}`", "", (module.__doc__ or "").partition("\n")[0], "")
    options: type[BaseModel] | None = getattr(module, "Config", None)
    if options is not None and options.model_fields:
        yield from (*HEAD, *_rows(options, nested=True))


def _rows(
    model: type[BaseModel],
    top: bool = False,
    nested: bool = False,
    prefix: str = "",
    defaults: BaseModel | None = None,
) -> Iterator[str]:
    """The rows of a section's table.

    Args:
        model: class of the section.
        top: leave out sections that have a heading of their own.
        nested: add the keys of subsections, for components, whose subsections have no heading.
        prefix: dotted path in front of every key.
        defaults: a section whose values are the defaults, in place of those of the class.
    """
    for key, field in model.model_fields.items():
        inner = section_class(field)
        if top and inner is not None and not issubclass(inner, Component):
            continue
        meaning = field.description or (_sentence(inner) if inner is not None else "")
        default = _default_value(field) if defaults is None else getattr(defaults, key)
        yield f"| `{prefix}{key}` | {_type(field.annotation)} | {_default(default)} | {table_cell(meaning)} |"
        if nested and inner is not None:
            one = default if isinstance(default, inner) else None
            yield from _rows(inner, nested=True, prefix=f"{prefix}{key}{'.' if one else '.0.'}", defaults=one)


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _type(annotation: Any) -> str:
    """A type in readable form: `int`, `auto / float32`, `list of str`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin is Annotated:
        return _type(inner[0])
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain = {str: "`str`", bool: "`bool`", int: "`int`", float: "`float`", NoneType: "null"}
    return plain.get(annotation, "any")


def _default_value(field: FieldInfo) -> Any:
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def _default(value: Any) -> str:
    if value is ...:
        return "required"
    if isinstance(value, Component):
        return f"`{{name: {value.name}}}`"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{table_cell(json.dumps(to_jsonable_python(value), ensure_ascii=False))}`"


def table_cell(text: str) -> str:
    """Text on one line, with the table's separator escaped."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
