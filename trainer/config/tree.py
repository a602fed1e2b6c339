"""YAML values before they are validated: reading, inheriting, overriding, and the origin of each value.

A file may have one `inherit: other.yaml`, relative to itself. Sections merge key by key; lists and components with
another `name` are replaced as a whole.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmquest_rl.loader import did_you_mean

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A configuration is invalid; the message lists every problem with its file and key."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__(f"{count} in the configuration\n" + "\n".join(f"  {problem}" for problem in problems))


class _Loader(yaml.SafeLoader):
    """YAML whose floats may be written `1e-5`, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"the key {twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


class ConfigTree:
    """Nested plain values, each with its origin: a file or the command line."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[KeyPath, str] = {}
        self._origin = origin
        self.merge(values, origin)

    @classmethod
    def read(cls, path: Path) -> "ConfigTree":
        """Read a file, merged over the file that it inherits from.

        Raises:
            ConfigError: a file is missing, is not YAML, or inherits more than one level deep.
        """
        return cls.inheriting(read_yaml(path), path, str(path))

    @classmethod
    def inheriting(cls, values: dict[str, Any], path: Path, origin: str) -> "ConfigTree":
        """Values of the file `path`, merged over the file that their key `inherit` names, if they have one.

        Raises:
            ConfigError: see `read`.
        """
        values = dict(values)
        parent_name = values.pop("inherit", None)
        if parent_name is None:
            return cls(values, origin)
        if not isinstance(parent_name, str):
            raise ConfigError(
                [f"{origin}: inherit: expected the path of one file, found {describe_value(parent_name)}"]
            )
        parent = path.parent / parent_name
        base = read_yaml(parent)
        if "inherit" in base:
            raise ConfigError([f"{origin}: inherit: {parent} has an `inherit` as well; only one level is allowed"])
        tree = cls(base, str(parent))
        tree.merge(values, origin)
        return tree

    def merge(self, values: dict[str, Any], origin: str) -> None:
        """Merge `values` over the present ones; `origin` is the file that they came from."""
        self._origin = origin
        self.values = self._merged(self.values, values, (), origin)

    def override(self, text: str) -> str | None:
        """Apply one override `a.b.c=value`; returns the problem with it, or None."""
        key, equals, raw = text.partition("=")
        path = parse_key(key)
        if not equals or "" in path:
            return f"{COMMAND_LINE}: {text!r}: expected KEY=VALUE, for instance optimizer.lr=1e-5"
        try:
            value = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError as error:
            return f"{COMMAND_LINE}: {key}: {raw!r} is not valid YAML: {error}"
        node: Any = self.values
        for i, part in enumerate(path[:-1]):
            node = _enter(node, part)
            if node is None:
                where = ".".join(map(str, path[: i + 1]))
                return f"{COMMAND_LINE}: {key}: {where} is neither a section nor an item of a list"
        return self._set(node, path, value)

    def origin(self, path: KeyPath) -> str:
        """The origin of the value at `path`: a file, or the command line."""
        while path and path not in self._origins:
            path = path[:-1]
        return self._origins.get(path, self._origin)

    def _set(self, node: Any, path: KeyPath, value: Any) -> str | None:
        last = path[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last >= len(node):
                return (
                    f"{COMMAND_LINE}: {'.'.join(map(str, path))}: the list has items 0 to {len(node) - 1}, not {last!r}"
                )
            node[last] = self._merged(None, value, path, COMMAND_LINE)
            return None
        if last == "name" and len(path) > 1 and node.get("name") != value:
            node.clear()  # the other keys belonged to the component that is replaced
        node[last] = self._merged(node.get(last), value, path, COMMAND_LINE)
        return None

    def _merged(self, base: Any, new: Any, at: KeyPath, origin: str) -> Any:
        if not (isinstance(new, dict) and isinstance(base, dict)) or (at and _is_other_component(base, new)):
            self._remember(new, at, origin)
            return new
        return base | {key: self._merged(base.get(key), value, (*at, key), origin) for key, value in new.items()}

    def _remember(self, value: Any, at: KeyPath, origin: str) -> None:
        self._origins[at] = origin
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            self._remember(item, (*at, key), origin)


def _is_other_component(base: dict[str, Any], new: dict[str, Any]) -> bool:
    return "name" in new and "name" in base and new["name"] != base["name"]


def _enter(node: Any, part: str | int) -> Any:
    """The section or list at `part` of `node`, created if it is missing; None if the value there is neither."""
    if isinstance(node, list):
        below = node[part] if isinstance(part, int) and part < len(node) else None
    else:
        if node.get(part) is None:
            node[part] = {}
        below = node[part]
    return below if isinstance(below, dict | list) else None


def parse_key(text: str) -> KeyPath:
    """Split a dotted key: `rewards.0.weight` becomes ("rewards", 0, "weight")."""
    return tuple(int(part) if part.isdecimal() else part for part in text.split("."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        folder = path.parent if path.parent.is_dir() else Path("configs")
        near = did_you_mean(str(path), sorted(str(sibling) for sibling in folder.glob("*.yaml")))
        raise ConfigError([f"{path}: there is no such file{near}"]) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: not a valid YAML file: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: expected lines of `key: value`, found {describe_value(values)}"])
    return values


def describe_value(value: Any) -> str:
    """Text for a value in an error message: `a section`, `a list`, `null`, or the value itself."""
    kinds = {dict: "a section", list: "a list", type(None): "null"}
    return kinds.get(type(value), repr(value))
