"""The files and commands of CONTRIBUTING.md, and a process that runs such commands in a copy of the repository.

python -m tests.contributing_page COMMANDS.json OUT.json       (runs them in the current folder, one after another)
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# ([\w/]+\.(?:py|yaml))\b")
COMMAND = ".venv/bin/llmquest-rl "


def files() -> dict[str, str]:
    """The text of each file of the page, by its path. The first line of its block names it."""
    found = {}
    for language, text in BLOCK.findall(PAGE.read_text()):
        if language in ("python", "yaml"):
            name = FILE_NAME.match(text)
            assert name is not None, f"the first line of this block names no file:\n{text}"
            found[name[1]] = text
    return found


def equation() -> dict[str, str]:
    """The lines that the page adds to `tests/algorithms/oracle.py`, by the name of their table."""
    [text] = [text for _, text in BLOCK.findall(PAGE.read_text()) if text.startswith("# tests/algorithms/oracle.py: ")]
    first, *lines = text.splitlines()
    return dict(zip(re.findall("[A-Z]+", first), lines, strict=True))


def commands() -> list[str]:
    """The lines of the page's blocks of shell commands, in order."""
    blocks = (text for language, text in BLOCK.findall(PAGE.read_text()) if language == "bash")
    return [line for text in blocks for line in text.replace("\\\n", "").splitlines()]


def run(command: str) -> dict[str, Any]:
    """Run a command; `llmquest-rl` runs in this process, which imports torch and the others once.

    Returns:
        `code` (0 = success), `output`, and `error` (the message of an exception, else empty).
    """
    if not command.startswith(COMMAND):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        return {"code": done.returncode, "output": done.stdout, "error": done.stderr}
    from trainer.cli.main import app

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            code = app(shlex.split(command.removeprefix(COMMAND)), standalone_mode=False) or 0
    except Exception as error:
        return {"code": 2, "output": output.getvalue(), "error": f"{type(error).__name__}: {error}"}
    return {"code": code, "output": output.getvalue(), "error": ""}


if __name__ == "__main__":
    results = {command: run(command) for command in json.loads(Path(sys.argv[1]).read_text())}
    Path(sys.argv[2]).write_text(json.dumps(results))
