"""Loads a `Config` from YAML files and overrides, or raises one error that lists every problem."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmquest_rl.loader import ComponentError, did_you_mean
from llmquest_rl.options import Options, options_class
from trainer.config.renamed_keys import RENAMED
from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.config.sections import Component, section_class
from trainer.config.tree import ConfigError, ConfigTree, KeyPath, describe_value, parse_key

__all__ = ["STAGES", "ConfigError", "dump", "load_config", "parse_config", "read_options", "validated"]

OptionsType = TypeVar("OptionsType", bound=Options)
STAGES = "stages"
"""The key that makes a file a pipeline of several run configurations (`trainer/pipeline/`)."""


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read and validate a configuration file, with its parent and overrides. No process starts and no weight is loaded.

    Args:
        path: a YAML file.
        overrides: `a.b.c=value` each, with the value in YAML; a number in the key selects an item of a list.

    Raises:
        ConfigError: the configuration is invalid; the message lists every problem.
    """
    tree = ConfigTree.read(Path(path))
    if STAGES in tree.values:
        raise ConfigError([f"{path}: the file has several stages: run it with `llmquest-rl pipeline {path}`"])
    problems = [problem for text in overrides if (problem := tree.override(text))]
    if problems:
        raise ConfigError(problems)
    return validated(tree)


def parse_config(values: dict[str, Any], origin: str = "configuration") -> Config:
    """Validate plain values.

    Args:
        values: the nested keys and values of a configuration.
        origin: name of their source in error messages.

    Raises:
        ConfigError: the configuration is invalid; the message lists every problem.
    """
    return validated(ConfigTree(values, origin))


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every value, including defaults. It is enough to repeat the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def read_options(kind: type[OptionsType], path: Path) -> OptionsType:
    """Read a YAML file that holds other options than a run configuration.

    Raises:
        ConfigError: the file or a value in it is invalid; the message lists every problem.
    """
    try:
        return kind(**ConfigTree.read(path).values)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        ) from error


def validated(tree: ConfigTree) -> Config:
    """The configuration of a tree of values.

    Raises:
        ConfigError: the configuration is invalid; the message lists every problem.
    """
    try:
        config = Config(**tree.values)
    except ValidationError as error:
        raise ConfigError([_describe(e, tree) for e in error.errors(include_url=False)]) from error
    try:
        broken = broken_rules(config)
    except ComponentError as error:  # the rules build the objective
        raise ConfigError([f"{tree.origin(('objective', 'name'))}: objective: {error}"]) from error
    if broken:
        raise ConfigError([f"{tree.origin(parse_key(key))}: {key}: {message}" for key, message in broken])
    return config


def _describe(error: ErrorDetails, tree: ConfigTree) -> str:
    """The message of one problem: origin, key, expected value and given value."""
    path = tuple(error["loc"])
    is_component = isinstance(error["input"], dict) and "name" in error["input"]
    place = f"{tree.origin((*path, 'name') if is_component else path)}: {'.'.join(map(str, path))}"
    found = describe_value(error["input"])
    if error["type"] == "extra_forbidden":
        if new := RENAMED.get(".".join(map(str, path))):
            return f"{place}: this key is now called {new}"
        return f"{place}: unknown key{did_you_mean(str(path[-1]), _known_keys(path[:-1], tree))}"
    if error["type"] == "missing":
        return f"{place}: required key is missing"
    if error["type"] == "value_error" and isinstance(error["input"], dict | list):
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{place}: expected a section of keys, found {found}"
    expected = error["msg"].removeprefix("Value error, ").split(", unable to")[0]
    expected = expected.replace("Input should be", "expected").replace("a valid integer", "an integer")
    expected = expected.replace("a valid ", "a ")
    return f"{place}: {expected}, found {found}"


def _known_keys(path: KeyPath, tree: ConfigTree) -> list[str]:
    """All valid keys of the section at `path`."""
    model: type[BaseModel] = Config
    values: Any = tree.values
    for part in path:
        values = values[part] if isinstance(part, int) else values.get(part, {})
        if isinstance(part, str) and part in model.model_fields:
            model = section_class(model.model_fields[part]) or model
    own = list(model.model_fields)
    if issubclass(model, Component):
        return own + list(options_class(model.kind, values.get("name", "")).model_fields)
    return own
