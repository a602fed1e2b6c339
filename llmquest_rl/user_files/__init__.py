"""Makes users' files importable: `/home/me/task.py` is the module `llmquest_rl.user_files.%2Fhome%2Fme%2Ftask%2Epy`.

The module's name holds the whole path, so a Ray actor can unpickle an object whose class is defined in a user's file:
to import the class, it imports this package, which finds the file. Its neighbours, and files of the current folder, are
found after every installed package, and `sys.path` stays as it is: a user's `rewards.py` never hides our package, in
no process. Only `llmquest_rl.loader` imports this package.
"""

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location, spec_from_loader
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

PREFIX = f"{__name__}."
OUR_PACKAGES = ("llmquest_rl", "rewards", "rollout", "trainer")


def module_name(path: Path) -> str:
    """The name under which a file is imported; two spellings of one path give the same name."""
    return PREFIX + quote(str(path.resolve()), safe="").replace(".", "%2E")


class UserFileLoader(SourceFileLoader):
    """Executes a user's file, and checks that it got the neighbours that it means."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the file.

        Raises:
            ImportError: an installed package, or a file of another folder, has the name of one of its neighbours.
        """
        try:
            super().exec_module(module)
        except ImportError:
            _check_neighbours(Path(self.path))
            raise
        _check_neighbours(Path(self.path))


class NeighbourLoader(Loader):
    """Gives a neighbour, imported by its short name, the module that its path has: it is executed once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the file under the name that holds its path."""
        module = importlib.import_module(module_name(self.file))
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing but undo what the import system has set: the module has been executed."""
        module.__spec__ = self.own_spec


class UserFileFinder(MetaPathFinder):
    """Finds the file of a name that `module_name` made, and the files beside it."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        """Folders of the users' files that were imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(PREFIX):
            file = Path(unquote(fullname.removeprefix(PREFIX)))
            self.add_folder(file.parent)
            return spec_from_file_location(fullname, file, loader=UserFileLoader(fullname, str(file)))
        if path is not None:  # a part of a package, which Python finds in the package's folder
            return None
        spec = PathFinder.find_spec(fullname, [*self.folders, *_current_folder()])
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        if spec.submodule_search_locations is not None:
            return spec
        return spec_from_loader(fullname, NeighbourLoader(Path(spec.origin)), origin=spec.origin)

    def add_folder(self, folder: Path) -> None:
        """Let the files of a folder be imported by their names."""
        if str(folder) not in self.folders:
            self.folders.append(str(folder))


def _current_folder() -> Iterator[str]:
    with suppress(FileNotFoundError):  # it was removed
        yield str(Path.cwd())


def _check_neighbours(file: Path) -> None:
    for imported in _imported_names(file):
        name, _, part = imported.partition(".")
        neighbour, module = _neighbour(file, name, is_package=bool(part)), sys.modules.get(name)
        found = getattr(module, "__file__", None)
        if neighbour is None or module is None or (found and Path(found).resolve() == neighbour.resolve()):
            continue
        raise ImportError(
            f"{file} imports {name!r}, which is beside it ({neighbour}), but got {found or 'a built-in module'}, which "
            f"has the same name: rename {neighbour.name if neighbour.stem == name else f'the folder {name}'}"
        )


def _neighbour(file: Path, name: str, is_package: bool) -> Path | None:
    """The file beside `file` that an import means: a module, or a package, which alone has parts."""
    module, package = file.with_name(f"{name}.py"), file.parent / name / "__init__.py"
    if module.is_file() and module != file and not is_package:
        return module
    # Another copy of this repository is not what the file means.
    return package if package.is_file() and name not in OUR_PACKAGES else None


def _imported_names(file: Path) -> set[str]:
    """The names that a file imports absolutely, with dots."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


FINDER = UserFileFinder()
sys.meta_path.append(FINDER)
