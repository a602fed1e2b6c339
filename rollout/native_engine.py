"""The engine that `rollout/engines/native.py` builds: our own models, sampled by `llmquest_rl.generation`."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llmquest_rl.generation.batch import GenerationError
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.generation.packed_weights import can_pack, pack_model, packed_bytes, unpack_model
from llmquest_rl.generation.quantize import fake_quantize_model
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.weight_map import disk_pieces, named_weights
from llmquest_rl.types import Completion, Request, Sampling
from rollout.decoding import Decoder
from rollout.engine import FACTS, EngineError, EngineSetup, cpu_threads
from rollout.weights import check_fit, check_newer


class NativeEngine:
    """Implements `rollout.engine.RolloutEngine` for our own models. Not thread-safe."""

    def __init__(
        self,
        model: CausalLM,
        decoder: Decoder,
        setup: EngineSetup,
        cache_tokens: int,
        pack_weights: bool,
        weight_bits: int | None,
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._setup = setup
        self._generator = NativeGenerator(
            model,
            decoder.eos_ids,
            context_tokens=setup.context_tokens,
            max_sequences=setup.max_sequences,
            cache_tokens=cache_tokens,
            texts=decoder.texts if decoder.decoder is not None else None,
        )
        self._packs = pack_weights and can_pack(model)
        self._weight_bits = weight_bits
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
                raise EngineError(f"the native engine failed with weight version {self.version}: {error}") from error

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
