"""What a rollout engine is, and how one is found by name.

An engine `foo` is the file `rollout/engines/foo.py`, which has

* `Config(Options)`: the keys beside `name:` in the configuration;
* `check(model_path, config, setup)`: raises ValueError, before any weight is loaded or process started, when this
  engine cannot serve that model;
* `build(model_path, config, setup) -> RolloutEngine`.

Nothing is registered: adding an engine is adding a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from llmquest_rl.deferred import torch
from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

FACTS = dict[str, str | int | float | bool | None]
"""What an engine says about itself: names to plain values, for logs and for `doctor`."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What every engine is told besides its own options."""

    context_tokens: int
    """Longest prompt plus its completion, in tokens: sizes the KV cache; no more is ever asked of the engine."""
    max_sequences: int = 128
    """Most completions that are drawn at the same time, for all requests of one `generate` together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; log-probs are float32 always."""
    dtype_reason: str = "configured"
    """Why that dtype: a probe, a GPU, or the user's word. `describe()` repeats it."""
    threads: int = 1
    """CPU threads that the engine may use; on a GPU irrelevant."""
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    """For what a request's own seed does not cover (weights of a `random` start, profiling runs)."""


class RolloutEngine(Protocol):
    """Draws completions from a model whose weights can be replaced while it runs."""

    @property
    def version(self) -> int:
        """Version of the weights in use; 0 = those of the folder that it was built from."""
        ...

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: [requests][n], in the order asked.

        Completion i of a request depends on the weights, the prompt, `sampling` and (seed, i), not on its neighbours
        (up to the rounding of matrix products of another shape).

        Raises:
            ValueError: an empty prompt, or one that leaves no room for a token in the context; the index is named.
            EngineError: the engine gave what cannot be used, e.g. a NaN log-prob; the request is named.
        """
        ...

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-prob, at temperature 1, of each token given those before it: [sequences][len - 1].

        For checks (probes, parity), not for speed: the caller compares them with the learner's own.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights of the running engine; nothing cached from the old ones survives.

        Args:
            tensors: (name, tensor) under the names and shapes of the Hub layout on disk; they are only read.
            version: larger than the present one.

        Raises:
            ValueError: a name is missing, unknown or of the wrong shape, or the version does not grow; nothing has been
                changed then.
        """
        ...

    def sleep(self) -> None:
        """Give back the memory that only generation needs. Idempotent; a no-op where there is none to give."""
        ...

    def wake(self) -> None:
        """Undo `sleep`; `generate`, `logprobs` and `load_weights` need an engine that is awake. Idempotent."""
        ...

    def close(self) -> None:
        """Free everything and leave no process behind. Idempotent."""
        ...

    def describe(self) -> FACTS:
        """Engine, version, dtype and why, threads, KV-cache size, and whatever explains its speed."""
        ...


class EngineError(RuntimeError):
    """The engine itself failed or answered nonsense: not the caller's input, and nothing to retry blindly."""


def engine_names() -> list[str]:
    """Every engine there is a file for, sorted."""
    return sorted(path.stem for path in (Path(__file__).parent / "engines").glob("*.py") if path.stem != "__init__")


def engine_module(name: str) -> ModuleType:
    """The file of an engine.

    Raises:
        ValueError: there is no such engine.
    """
    if name not in engine_names():
        raise ValueError(f"no rollout engine is called {name!r}; there are: {', '.join(engine_names())}")
    return import_module(f"rollout.engines.{name}")


def engine_config(name: str) -> type[Options]:
    """The options class of an engine, for validating the keys beside `name:`. Imports no engine library."""
    config: type[Options] = engine_module(name).Config
    return config


def check_engine(name: str, config: Options, model_path: Path, setup: EngineSetup) -> None:
    """Whether an engine can serve a model, before anything is started.

    Raises:
        ValueError: it cannot; the message says why, and which engine can.
    """
    _check_writes(model_path)
    engine_module(name).check(model_path, config, setup)


def _check_writes(model_path: Path) -> None:
    """Whether a model of ours predicts tokens. What is not ours or not there is the engine's to judge."""
    from llmquest_rl.models.base import CausalLM
    from llmquest_rl.models.hf import architectures
    from llmquest_rl.models.weight_files import read_json

    file = model_path / "config.json"
    names = read_json(file).get("architectures") or [] if file.exists() else []
    for name in names:
        if name in architectures() and not issubclass(architectures()[name].model, CausalLM):
            raise ValueError(f"{model_path} holds a {name}, which scores and writes no text: give a language model")


def open_engine(name: str, config: Options, model_path: Path, setup: EngineSetup) -> RolloutEngine:
    """Check, then start an engine around the model in a folder of the Hub layout."""
    check_engine(name, config, model_path, setup)
    engine: RolloutEngine = engine_module(name).build(model_path, config, setup)
    return engine


def choose_engine(model_path: Path, setup: EngineSetup) -> tuple[str, str]:
    """The engine that `auto` means here, and why: vLLM where it is installed and can serve the model, else native."""
    if find_spec("vllm") is None:
        return "native", "vLLM is not installed"
    try:
        check_engine("vllm", engine_config("vllm")(), model_path, setup)
    except ValueError as refusal:
        return "native", str(refusal)
    return "vllm", "vLLM is installed and serves this model"


def check_context(model_path: Path, longest: int | None, setup: EngineSetup) -> None:
    """Whether a model's positions suffice for what will be asked of it.

    Raises:
        ValueError: they do not.
    """
    if longest is not None and setup.context_tokens > longest:
        raise ValueError(
            f"the model in {model_path} knows {longest} positions, but prompts and completions may take "
            f"{setup.context_tokens} tokens: lower max_prompt_tokens or max_tokens"
        )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with that many threads meanwhile: their number changes the rounding, and others here have their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
