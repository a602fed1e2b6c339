"""The native engine, which runs our own model in this process with `llmquest_rl.generation`.

It is the default where vLLM is not installed, and the reference for tests of other engines. Runs with it can be resumed
bit for bit; `llmquest_rl.generation.engine` lists the conditions.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from llmquest_rl.generation.batch import GenerationError
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.generation.packed_weights import can_pack, pack_model, packed_bytes, unpack_model
from llmquest_rl.generation.quantize import fake_quantize_model
from llmquest_rl.models.architectures import find_architecture
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import load_model, new_model
from llmquest_rl.models.weight_map import disk_pieces, named_weights
from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling
from rollout.decoding import Decoder
from rollout.engine import FACTS, EngineError, EngineSetup, check_context, cpu_threads
from rollout.weights import check_fit, check_newer


class Config(Options):
    """Options of the native engine."""

    cache_tokens: int = Field(default=65536, ge=1)
    """Maximum number of cached tokens; a prompt counts once for all its completions. Completions wait until there is
    room. A token takes 8 bytes (float32 key and value) x layers x key/value heads x head size."""
    pack_weights: bool = True
    """Store a second copy of the weights in the layout of the CPU's kernels, which is faster but takes more memory. No
    effect on a GPU."""
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    """Round the weights to this many bits on every load, as a quantised engine would; null = no rounding. Use it for
    experiments on the mismatch between engine and learner: it saves neither memory nor time."""


def check(model_path: Path, config: Config, setup: EngineSetup) -> None:
    """Check that the model's architecture is implemented and supports the context length.

    Raises:
        ValueError: It does not. The message gives the reason.
    """
    path = model_path / "config.json"
    if not path.exists():
        raise ValueError(f"{model_path} has no config.json: give a model folder in the Hugging Face layout")
    values = json.loads(path.read_text(encoding="utf-8"))
    shape = find_architecture(values, path).config.from_hf(values)
    check_context(model_path, getattr(shape, "max_positions", None), setup)


def build(model_path: Path, config: Config, setup: EngineSetup) -> "NativeEngine":
    """Build an engine with the model of a folder, or with random weights if the folder has none."""
    dtype = getattr(torch, setup.dtype)
    if any(model_path.glob("*.safetensors")):
        model = load_model(model_path, dtype, setup.device)
    else:
        model = new_model(model_path, dtype, setup.device, setup.seed)
    return NativeEngine(model, Decoder(model_path), config, setup)


class NativeEngine:
    """Implements `rollout.engine.RolloutEngine` for our own models. Not thread-safe."""

    def __init__(self, model: CausalLM, decoder: Decoder, config: Config, setup: EngineSetup) -> None:
        self._model = model.requires_grad_(False).eval()
        self._setup = setup
        self._generator = NativeGenerator(
            model,
            decoder.eos_ids,
            context_tokens=setup.context_tokens,
            max_sequences=setup.max_sequences,
            cache_tokens=config.cache_tokens,
            texts=decoder.texts if decoder.tokenizer is not None else None,
        )
        self._packs = config.pack_weights and can_pack(model)
        self._weight_bits = config.weight_bits
        self._prepare_weights()
        self._awake = True

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        return self._generator.version

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        self._check_awake()
        with cpu_threads(self._setup.threads):
            try:
                return self._generator.generate(requests, sampling)
            except GenerationError as error:
                raise EngineError(f"native engine, weight version {self.version}: {error}") from error

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """See `RolloutEngine.logprobs`."""
        self._check_awake()
        with cpu_threads(self._setup.threads):
            return self._generator.logprobs(sequences)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._check_awake()
        check_newer(version, self.version)
        given = list(tensors)
        weights = dict(named_weights(self._model))
        targets = {disk: piece.view(weights[piece.ours]) for disk, piece in disk_pieces(self._model).items()}
        check_fit(given, {name: tuple(target.shape) for name, target in targets.items()})
        with torch.no_grad():
            for name, tensor in given:
                targets[name].copy_(tensor)
        self._prepare_weights()
        self._generator.version = version

    def sleep(self) -> None:
        """Free the cache and the packed copy of the weights."""
        self._generator.release()
        unpack_model(self._model)
        self._awake = False

    def wake(self) -> None:
        """Undo `sleep`. The cache is allocated when it is next needed."""
        if self._packs and not self._awake:
            pack_model(self._model)
        self._awake = True

    def close(self) -> None:
        """Free the same memory as `sleep`; the weights are freed with the engine object."""
        self.sleep()

    def describe(self) -> FACTS:
        """See `RolloutEngine.describe`."""
        return {
            "engine": "native",
            "architecture": type(self._model).__name__,
            "version": self.version,
            "dtype": self._setup.dtype,
            "dtype_reason": self._setup.dtype_reason,
            "device": self._setup.device,
            "threads": self._setup.threads,
            "max_sequences": self._setup.max_sequences,
            "context_tokens": self._setup.context_tokens,
            "weight_bits": self._weight_bits or "as loaded",
            "packed_bytes": packed_bytes(self._model),
            "cache_tokens": self._generator.cache_tokens,
            "cache_bytes": self._generator.cache_bytes,
        }

    def _prepare_weights(self) -> None:
        """Round and pack the loaded weights, if the options ask for it."""
        if self._weight_bits is not None:
            fake_quantize_model(self._model, self._weight_bits)
        if self._packs:
            pack_model(self._model)

    def _check_awake(self) -> None:
        if not self._awake:
            raise EngineError("the native engine is asleep or closed: call wake() first")
