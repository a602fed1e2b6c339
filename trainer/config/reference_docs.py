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
from rewards.builtin import REWARDS
from rollout import ENGINES
from trainer.config.schema import Config
from trainer.config.sections import OBJECTIVES, Component, section_class

INTRODUCTION = """# Configuration reference

This page is generated from the code by `make docs`. The texts are the docstrings of `trainer/config/schema.py` and of
the components.

A recipe is a YAML file. It may have one `inherit: other.yaml`, relative to itself. Sections merge key by key; lists and
components with another `name` are replaced as a whole. On the command line `a.b.c=value` overrides a key, and
`rewards.0.weight=0.5` a key of a list's item; values are YAML. Unknown keys are errors. Every option is checked before
any process starts; `llmquest-rl train CONFIG --dry-run` checks the data, the model files and the rewards as well.

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


def reference() -> str:
    """The complete Markdown document."""
    lines = [INTRODUCTION, "## The run", "", *_table(Config, scalars_only=True)]
    for key, field in Config.model_fields.items():
        model = section_class(field)
        if model is not None:
            lines += _section(key, model)
    lines += _components()
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    """The lines of a section and of its subsections."""
    if issubclass(model, Component):
        return
    yield from ("", f"## {path}", "", _sentence(model), "", *_table(model))
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
        yield from _table(options)


def _table(model: type[BaseModel], scalars_only: bool = False) -> Iterator[str]:
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for key, field in model.model_fields.items():
        inner = section_class(field)
        if scalars_only and inner is not None:
            continue
        meaning = field.description or (_sentence(inner) if inner is not None else "")
        yield f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {_cell(meaning)} |"


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


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if section_class(field) is not None:
        return "null" if field.default is None else "its defaults"
    shown = json.dumps(to_jsonable_python(field.get_default(call_default_factory=True)), ensure_ascii=False)
    return f"`{_cell(shown)}`"


def _cell(text: str) -> str:
    """Text on one line, with the table's separator escaped."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
