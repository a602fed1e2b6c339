"""Makes users' files importable: `/home/me/task.py` is the module `llmquest_rl.user_files.%2Fhome%2Fme%2Ftask%2Epy`.

The module's name holds the whole path, so a Ray actor can unpickle an object whose class is defined in a user's file:
to import the class, it imports this package, which finds the file. Only `llmquest_rl.loader` imports this package.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

PREFIX = f"{__name__}."


def module_name(path: Path) -> str:
    """The name under which a file is imported; two spellings of one path give the same name."""
    return PREFIX + quote(str(path.resolve()), safe="").replace(".", "%2E")


class UserFileFinder(MetaPathFinder):
    """Finds the file of a name that `module_name` made, and lets the file import its neighbours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(PREFIX):
            return None
        file = Path(unquote(fullname.removeprefix(PREFIX)))
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))  # last, so that a neighbour never hides an installed package
        return spec_from_file_location(fullname, file)


sys.meta_path.append(UserFileFinder())
