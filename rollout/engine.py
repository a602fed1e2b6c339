"""The protocol of a rollout engine, and functions that check and start an engine by its name.

An engine `foo` is the file `rollout/engines/foo.py`, or a user's own `path/foo.py` or `package.foo`, which has

* `Config(Options)`: the other keys of its section in the configuration;
* `check(model_path, config, setup)`: raises ValueError if the engine cannot serve the model; it loads no weights and
  starts no process;
* `build(model_path, config, setup) -> RolloutEngine`.

There is no registry: a new engine is a new file (`llmquest_rl/loader.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from llmquest_rl.deferred import torch
from llmquest_rl.loader import users_code
from llmquest_rl.options import Options, options_class
from llmquest_rl.types import Completion, Request, Sampling
from rollout import ENGINES

if TYPE_CHECKING:
    from torch import Tensor

FACTS = dict[str, str | int | float | bool | None]
"""Facts about an engine by name, as plain values, for logs and for `doctor`."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """Settings of every engine, in addition to its own options."""

    context_tokens: int
    """Maximum tokens of a prompt and its completion together. It sizes the KV cache; no request is longer."""
    max_sequences: int = 128
    """Maximum number of completions sampled at the same time, over all requests of one `generate` call."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; log-probs are always float32."""
    dtype_reason: str = "configured"
    """Reason for the dtype (a probe, a GPU, or the configuration), which `describe()` reports."""
    threads: int = 1
    """CPU threads that the engine may use; no effect on a GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    """Seed for random numbers that do not belong to a request: weights of a `random` start, profiling runs."""


class RolloutEngine(Protocol):
    """Samples completions from a model whose weights can be replaced while the engine runs."""

    @property
    def version(self) -> int:
        """Version of the weights in use; 0 = the weights of the folder that the engine was built from."""
        ...

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Sample `n` completions of each request: [requests][n], in the order of the requests.

        Completion i of a request depends on the weights, the prompt, `sampling` and (seed, i). Other requests affect it
        only through rounding, because matrix products of other shapes round differently.

        Raises:
            ValueError: A prompt is empty, or leaves no room for a token in the context. The message gives its index.
            EngineError: The engine returned an unusable result, e.g. a NaN log-prob. The message names the request.
        """
        ...

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Compute the log-prob of each token given those before it, at temperature 1: [sequences][len - 1].

        It serves checks (probes, parity) that compare the engine with the learner, and is not optimised for speed.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights of the running engine, and drop everything cached from the old weights.

        Args:
            tensors: Pairs (name, tensor) with the names and shapes of the Hub layout on disk. They are only read.
            version: Version of the new weights, larger than the current version.

        Raises:
            ValueError: A tensor is missing, unknown or of the wrong shape, or the version is not larger. No weight has
                been changed then.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only generation needs, if there is any. Idempotent."""
        ...

    def wake(self) -> None:
        """Undo `sleep`. `generate`, `logprobs` and `load_weights` raise EngineError until then. Idempotent."""
        ...

    def close(self) -> None:
        """Free all memory and end all processes of the engine. Idempotent."""
        ...

    def describe(self) -> FACTS:
        """Report name, weight version, dtype and its reason, threads, KV-cache size, and settings that affect speed."""
        ...


class EngineError(RuntimeError):
    """The engine failed or returned an invalid result. The input is valid, but the same call will fail again."""


def engine_config(name: str) -> type[Options]:
    """The options class of an engine, which validates the other keys of its section. Imports no engine library.

    Raises:
        ComponentError: there is no such engine.
    """
    return options_class(ENGINES, name)


def check_engine(name: str, config: Options, model_path: Path, setup: EngineSetup) -> None:
    """Check that an engine can serve a model, before anything is started.

    Raises:
        ValueError: the engine cannot serve the model; the message gives the reason and an engine that can.
    """
    _check_generates(model_path)
    with users_code(name):
        ENGINES.module(name).check(model_path, config, setup)


def _check_generates(model_path: Path) -> None:
    """Check that a model, if it is one of ours, generates text. Engines check other models and missing files."""
    from llmquest_rl.models.architectures import architectures
    from llmquest_rl.models.base import CausalLM
    from llmquest_rl.models.checkpoint.weight_files import read_json

    file = model_path / "config.json"
    names = read_json(file).get("architectures") or [] if file.exists() else []
    for name in names:
        if name in architectures() and not issubclass(architectures()[name].model, CausalLM):
            raise ValueError(
                f"{model_path} is a {name}, which scores its input and cannot generate text: give a language model"
            )


def open_engine(name: str, config: Options, model_path: Path, setup: EngineSetup) -> RolloutEngine:
    """Check and start an engine with the model of a folder in the Hub layout.

    Raises:
        ValueError: the engine cannot serve the model.
    """
    check_engine(name, config, model_path, setup)
    with users_code(name):
        engine: RolloutEngine = ENGINES.module(name).build(model_path, config, setup)
    return engine


def choose_engine(model_path: Path, setup: EngineSetup) -> tuple[str, str]:
    """The best engine for a model and the reason: vLLM if it is installed and serves the model, else native."""
    if find_spec("vllm") is None:
        return "native", "vLLM is not installed"
    try:
        check_engine("vllm", engine_config("vllm")(), model_path, setup)
    except ValueError as refusal:
        return "native", str(refusal)
    return "vllm", "vLLM is installed and serves this model"


def check_context(model_path: Path, longest: int | None, setup: EngineSetup) -> None:
    """Check that a model has enough positions for the longest request.

    Args:
        model_path: Folder of the model, for the message.
        longest: Positions of the model; None = unlimited.
        setup: Holds the context length of requests.

    Raises:
        ValueError: The context is longer than the model's positions.
    """
    if longest is not None and setup.context_tokens > longest:
        raise ValueError(
            f"the model in {model_path} supports {longest} positions, but a prompt and its completion may take "
            f"{setup.context_tokens} tokens: lower data.max_prompt_tokens, or max_tokens in rollout.sampling or eval"
        )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set the number of torch's CPU threads inside the context, and restore it afterwards.

    The number of threads affects rounding, and other code in this process sets its own number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
