"""Finds a component by its name: a task, a data set, an objective, an engine or a reward. Nothing is registered.

* `gsm8k` is a built-in: the file of that name in the package of its kind.
* `path/to/file.py` or `package.module` is a user's module with the same functions as a built-in.
* `path/to/file.py:function` or `package.module:function` is one function of a user's module.

Relative paths start at the current folder, and modules are looked for there, too. A process executes a file once; the
file may import its neighbours (`llmquest_rl/user_files`). This module uses the standard library alone, because every
grader process loads it.
"""

import importlib
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from llmquest_rl.user_files import FINDER, OUR_PACKAGES, module_name

ROOT = Path(__file__).parent.parent
NOT_USERS = (
    *(f"{ROOT / package}/" for package in OUR_PACKAGES),
    *(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "purelib", "platlib")),
    "<frozen ",
)
"""Beginnings of the file names, in a traceback, of code that no user wrote."""


class ComponentError(ValueError):
    """A component cannot be loaded. The message says what is missing or which line fails, and what to do."""


@dataclass(frozen=True, slots=True)
class ComponentKind:
    """One kind of component, such as tasks."""

    noun: str
    """The word for one component in error messages, with its article: `a task`."""
    package: str
    """The package whose files are the built-in components."""
    functions: tuple[str, ...]
    """The functions that a module of this kind must have."""
    can_be_function: bool = True
    """Whether a single function can be a component. An engine is always a whole module."""

    def names(self) -> list[str]:
        """The built-in components, sorted. No module is imported."""
        found = pkgutil.iter_modules(_folders(self.package))
        return sorted(module.name for module in found if not module.name.startswith("_"))

    def module(self, name: str) -> ModuleType:
        """The module that a name points to, or the module of the function that it points to.

        Raises:
            ComponentError: there is no such module, it cannot be imported, or it lacks a function.
        """
        location, function = locate(name) if is_users_own(name) else (name, "")
        if function and not self.can_be_function:
            raise ComponentError(f"{name!r}: {self.noun} is a whole module, not one function; write {location!r}")
        module = _import_users(location) if is_users_own(name) else self._import_builtin(name)
        for required in () if function else self.functions:
            _function(module, required, f" (or name one function: {location}:...)" if self.can_be_function else "")
        return module

    def function(self, name: str) -> Callable[..., Any]:
        """The user's function if the name ends in `:function`, else the first function of the component's module.

        Raises:
            ComponentError: see `module`; or the module has no such function.
        """
        return _function(self.module(name), name.rpartition(":")[2] if ":" in name else self.functions[0])

    def _import_builtin(self, name: str) -> ModuleType:
        known = self.names()
        if name not in known:
            hint = did_you_mean(name, known, list_all=True)
            own = "path/file.py:function" if self.can_be_function else "path/file.py"
            raise ComponentError(f"{name!r} is not the name of {self.noun}{hint} (your own code: `{own}`)")
        try:
            return importlib.import_module(f"{self.package}.{name}")
        except ModuleNotFoundError as error:
            raise ComponentError(
                f"{name!r} needs the package {error.name!r}, which is not installed; run `make setup`"
            ) from error
        except Exception as error:
            raise ComponentError(f"{name!r} cannot be imported: {failing_line(error)}") from error


def _folders(package: str) -> Iterable[str]:
    """The folders of a package. The package is not imported."""
    if package in sys.modules:
        return sys.modules[package].__path__
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, f"{package} is a package"
    return spec.submodule_search_locations


def is_users_own(name: str) -> bool:
    """Whether a name points to a user's code: names of built-in components have neither a dot nor a colon."""
    return "." in name or ":" in name


def absolute_name(name: str) -> str:
    """The name with the path of its file made absolute: it then means the same file in every process."""
    location, colon, function = name.rpartition(":") if ":" in name else (name, "", "")
    return f"{Path(location).expanduser().absolute()}{colon}{function}" if location.endswith(".py") else name


def locate(name: str) -> tuple[str, str]:
    """The file or module of a user's component, and the function in it (empty if the component is the module).

    Raises:
        ComponentError: there is no such file, or no function's name follows the colon. Nothing is imported.
    """
    location, colon, function = name.rpartition(":") if ":" in name else (name, "", "")
    if colon and not function.isidentifier():
        raise ComponentError(f"{name!r} should end in `:function`, the name of a function")
    file = Path(location).expanduser()
    if location.endswith(".py") and not file.is_file():
        missing = f"{location} is a folder, not a file" if file.is_dir() else f"there is no file {location}"
        raise ComponentError(f"{missing} (relative paths start at {Path.cwd()})")
    if not location.endswith(".py") and not all(part.isidentifier() for part in location.split(".")):
        raise ComponentError(f"{location!r} is neither a file that ends in .py nor the name of a module")
    return location, function


def users_function(name: str) -> Callable[..., Any]:
    """The user's function that `path/file.py:function` or `module:function` points to.

    Raises:
        ComponentError: there is none, or its module cannot be imported.
    """
    location, function = locate(name)
    return _function(_import_users(location), function)


def did_you_mean(word: str, known: Iterable[str], list_all: bool = False) -> str:
    """The end of a message about an unknown word: the known words that resemble it, or else all of them.

    With `list_all` it gives all of them in either case.
    """
    known = list(known)
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    if not near:
        return f"; there are: {', '.join(known)}" if known else ""
    everything = f" There are: {', '.join(known)}" if list_all else ""
    return f"; did you mean {' or '.join(near)}?{everything}"


def _import_users(location: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be newer than Python's cached listing of its folder
    try:
        return _import_file(Path(location).expanduser()) if location.endswith(".py") else _import_module(location)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if location == missing or location.startswith(f"{missing}."):
            raise ComponentError(
                f"there is no module {missing!r}, neither in the current folder {Path.cwd()} nor installed"
            ) from error
        raise ComponentError(
            f"{location} cannot be imported: {failing_line(error)}. Install the package that has {missing!r}, e.g. "
            f"`pip install {missing.partition('.')[0]}`, or, if it is a file of yours, put it beside the importing file"
        ) from error
    except (Exception, SystemExit) as error:  # anything can happen while a user's module is executed
        raise ComponentError(f"{location} cannot be imported: {failing_line(error)}") from error


def _import_file(file: Path) -> ModuleType:
    path = file.resolve()
    loaded = (module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(path))
    return next(loaded, None) or importlib.import_module(module_name(file))


def _import_module(name: str) -> ModuleType:
    spec = find_spec(name)
    if spec is not None and spec.origin is not None and not spec.origin.startswith(NOT_USERS):
        FINDER.add_folder(Path(spec.origin).parent)
        if (same := sys.modules.get(module_name(Path(spec.origin)))) is not None:
            return same
    return importlib.import_module(name)


@contextmanager
def users_code(name: str) -> Iterator[None]:
    """Tell an exception of a user's component by the line that raised it. Exceptions of built-ins pass unchanged.

    Raises:
        ComponentError: the component that `name` points to is a user's, and it raised an exception of its own.
    """
    try:
        yield
    except Exception as error:
        is_ours = type(error).__module__.partition(".")[0] in OUR_PACKAGES
        if is_ours or not is_users_own(name):
            raise
        raise ComponentError(f"{name} failed: {failing_line(error)}") from error


def failing_line(error: BaseException) -> str:
    """The last line of the user's own code that ran, and the exception that it led to."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(NOT_USERS)]
    where = (frames[-1].filename, frames[-1].lineno, frames[-1].line) if frames else None
    message = str(error)
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        where, message = (str(error.filename), error.lineno, error.text), error.msg
    place = "" if where is None else f"{where[0]}, line {where[1]}, `{(where[2] or '').strip()}`: "
    return f"{place}{type(error).__name__}: {message}"


def _function(module: ModuleType, name: str, hint: str = "") -> Callable[..., Any]:
    function: object = getattr(module, name, None)
    if not callable(function):
        own = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        known = [key for key, value in own.items() if getattr(value, "__module__", None) == module.__name__]
        place = module.__file__ or module.__name__
        raise ComponentError(f"{place} has no function {name!r}{did_you_mean(name, known)}{hint}")
    return function
