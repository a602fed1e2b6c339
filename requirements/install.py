"""Makes `.venv` with everything that training, tests and checks need. Run by `make setup`; needs only Python and pip.

uv installs the packages, because it is many times faster than pip. It gets pip's settings: a folder of wheels, another
index, a certificate. A second run with nothing changed returns at once.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
UV = "uv==0.13.9"
PIP_SECTIONS = ("global", "install", ":env:")
"""Sections of pip's configuration that apply to an installation; later ones override earlier ones."""
OWN_PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command; where it fails, say which and end."""
    result = subprocess.run([str(part) for part in command], env=env, cwd=ROOT)
    if result.returncode:
        sys.exit(f"setup: failed (exit code {result.returncode}): {' '.join(map(str, command))}")


def find_device() -> tuple[str, str]:
    """`cpu` or `gpu`, and why."""
    asked = os.environ.get("DEVICE", "").lower()
    if asked in ("cpu", "gpu"):
        return asked, "asked for with DEVICE"
    if asked:
        sys.exit(f"setup: DEVICE must be cpu or gpu, not {asked!r}")
    if Path("/dev/nvidia0").exists():
        return "gpu", "found /dev/nvidia0"
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True).stdout.strip():
        return "gpu", "nvidia-smi lists a GPU"
    return "cpu", "found no NVIDIA GPU; DEVICE=gpu overrides"


def pip_command() -> list[str] | None:
    """A pip that can install into another environment (pip >= 22.3), or None."""
    pip = [sys.executable, "-m", "pip"]
    answer = subprocess.run([*pip, "--version"], capture_output=True, text=True)
    words = answer.stdout.split()
    if answer.returncode or len(words) < 2:
        return None
    major, minor = (int(part) for part in words[1].split(".")[:2])
    return pip if (major, minor) >= (22, 3) else None


def pip_settings(pip: list[str]) -> dict[str, str]:
    """Pip's settings for an installation, from the environment and from files: values by name."""
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True).stdout.splitlines()
    entries = [line.partition("=") for line in listed]
    return {
        key.removeprefix(f"{section}."): " ".join(ast.literal_eval(value).split())
        for section in PIP_SECTIONS
        for key, _, value in entries
        if key.startswith(f"{section}.")
    }


def uv_variable(name: str) -> str | None:
    """The variable of uv for a setting of pip about the places of packages; None for any other setting."""
    if name == "cert":
        return "SSL_CERT_FILE"
    if name == "find-links" or "index" in name.split("-"):
        return "UV_" + name.upper().replace("-", "_")
    return None


def uv_environment(pip: list[str]) -> dict[str, str]:
    """The environment in which uv finds the same packages as pip. Variables that the user set for uv come first."""
    env = dict(os.environ)
    for name, value in pip_settings(pip).items():
        variable = uv_variable(name)
        if value and variable is not None and variable not in env:
            env[variable] = value
            say(f"pip's {name} is passed on to uv")
    if SYSTEM_CERTIFICATES.exists():  # behind a proxy of a company its certificate is there, and not among uv's own
        env.setdefault("UV_SYSTEM_CERTS", "1")
    # As pip does: the best version of all indexes, not the first index that has the name.
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return env


def local_torch(env: dict[str, str]) -> bool:
    """Whether a find-links folder holds a torch wheel: then it decides which build of torch is installed."""
    folders = env.get("UV_FIND_LINKS", "").replace(",", " ").split()
    return any(list(Path(folder.removeprefix("file://")).glob("torch-*.whl")) for folder in folders)


def stamp(device: str) -> str:
    """A text that changes with the list of packages."""
    files = [HERE / f"{device}.txt", HERE / f"overrides-{device}.txt", ROOT / "pyproject.toml", Path(__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{device} {sys.version_info.major}.{sys.version_info.minor} {ROOT} {digest}"


def make_venv() -> list[str]:
    """An empty `.venv`; returns the pip to fill it with."""
    say(f"making {VENV.name} with Python {sys.version.split()[0]}")
    pip = pip_command()
    run(sys.executable, "-m", "venv", "--clear", *(["--without-pip"] if pip else []), VENV)
    return [*pip, "--python", str(PYTHON)] if pip else [str(PYTHON), "-m", "pip"]


def install(device: str) -> None:
    pip = make_venv()
    say(f"installing {UV}")
    run(*pip, "install", "--quiet", "--disable-pip-version-check", UV)
    env = uv_environment(pip)
    # On CPU machines uv finds the small CPU build of torch by itself, unless a local wheel is offered.
    backend = [] if device == "gpu" or local_torch(env) else ["--torch-backend", "cpu"]
    say(f"installing requirements/{device}.txt (some gigabytes the first time)")
    uv = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON]
    overrides = ["--override", HERE / f"overrides-{device}.txt"]
    run(*uv, "-r", HERE / f"{device}.txt", *overrides, *backend, env=env)
    say("installing this project, editable")
    run(*uv, "--no-deps", "-e", ROOT, env=env)


def compile_packages() -> None:
    """Compile the installed packages on all cores, but for their tests.

    Python itself keeps nothing that it compiles where PYTHONDONTWRITEBYTECODE is set, as in most containers and on many
    CI machines. Each process of a run would then compile all its imports anew, which is half of the time it takes to
    start. `compileall` writes its files in any case. Each of them holds the time and size of its source, so Python
    never uses one whose source has changed.
    """
    start = time.monotonic()
    packages = sysconfig.get_path("purelib", vars={"base": str(VENV)})
    compile_folder("-x", "/tests?/", packages)
    say(f"compiled the installed packages in {time.monotonic() - start:.0f} s")


def compile_folder(*arguments: str) -> None:
    # Not by `run`: compileall also fails when a package carries a file for a newer Python, which nobody imports.
    command = [str(PYTHON), "-W", "ignore", "-m", "compileall", "-qq", "-j", "0", "--invalidation-mode", "timestamp"]
    subprocess.run([*command, *arguments], cwd=ROOT)


def main() -> None:
    # The user's Python runs this file, and may be older.
    if sys.version_info < (3, 11):  # noqa: UP036
        found = sys.version.split()[0]
        sys.exit(f"setup: Python 3.11 or newer is needed, this is {found}; try: make setup PYTHON=python3.12")
    device, reason = find_device()
    say(f"for {device.upper()}: {reason}")
    wanted = stamp(device)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        compile_folder(*OWN_PACKAGES)  # their sources change between two set-ups
        say("up to date, nothing to do (to start afresh: rm -rf .venv)")
        return
    start = time.monotonic()
    install(device)
    compile_packages()
    compile_folder(*OWN_PACKAGES)
    STAMP.write_text(wanted)
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
