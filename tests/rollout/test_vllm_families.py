"""vLLM on a CPU, transformers and our own models give the same log-probs, for every architecture, before and after a
live update.

vLLM runs in a process of its own, because a process has room for one at a time. The second set of weights belongs to
another random model, so a single tensor that is not updated changes the log-probs.
"""

import json
import platform
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.models.vlm import VLMConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.types import Request, Sampling
from rollout.engine import EngineSetup, check_engine, choose_engine, engine_config
from rollout.engines import vllm
from rollout.vllm_limits import kv_cache_bytes, read_vllm_shape
from rollout.worker import RolloutWorker
from tests.rollout.conftest import WorkerElsewhere, sync_weights
from tests.rollout.tiny_shapes import TINY

CONTEXT = 96
"""Tokens; the tiny GPT-2 has that many positions."""

DTYPES = {"qwen3_next": "bfloat16"}
"""Models that are not served in float32."""

TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (0.15, 0.02)}
"""Largest and mean difference in nats. transformers in bfloat16 is as far from its own float32."""

SEQUENCES = [[(7 * i * i + 3 * i + 5) % 120 + 3 for i in range(length)] for length in (CONTEXT, 60, 33, 7)]


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_model(folder: Path, values: dict[str, Any], seed: int) -> Path:
    """Write a random model as transformers saves it. Biases, norms and buffers are random too, so none can be left out.

    Its config.json has exactly the given values, because transformers drops fields that it does not use.
    """
    write_config(folder, values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for tensor in vectors(model):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def vectors(model: nn.Module) -> list[Tensor]:
    """Parameters with one dimension, and the buffers that are saved."""
    saved = model.state_dict().keys()
    return [p for p in model.parameters() if p.ndim == 1] + [b for n, b in model.named_buffers() if n in saved]


@torch.no_grad()
def reference(folder: Path, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs [sequences][len - 1] by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    scored = []
    for tokens in sequences:
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        scored.append(logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist())
    return scored


def native(folder: Path, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs [sequences][len - 1] by our own model in float32."""
    generator = NativeGenerator(load_model(folder, torch.float32).eval(), frozenset(), CONTEXT)
    return generator.logprobs(sequences)


def assert_close(ours: list[list[float]], theirs: list[list[float]], dtype: str) -> None:
    """Compare log-probs [sequences][len - 1] within the tolerances of a dtype, over all tokens together."""
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    differences = torch.tensor(pairs).diff().abs()
    largest, mean = TOLERANCES[dtype]
    assert differences.max() < largest and differences.mean() < mean, (differences.max(), differences.mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_logprobs_are_those_of_transformers_and_ours_before_and_after_a_live_update(name: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    dtype = DTYPES.get(name, "float32")
    old, new = (write_model(tmp_path / str(seed), TINY[name], seed) for seed in (0, 1))
    worker = WorkerElsewhere("vllm", old, EngineSetup(context_tokens=CONTEXT, max_sequences=8, dtype=dtype))
    try:
        assert_close(worker.engine.logprobs(SEQUENCES), reference(old, SEQUENCES), dtype)
        assert_close(native(old, SEQUENCES), reference(old, SEQUENCES), "float32")
        sync_weights(worker, dict(disk_tensors(load_model(new, torch.float32))))
        assert_close(worker.engine.logprobs(SEQUENCES), reference(new, SEQUENCES), dtype)
        assert_close(worker.engine.logprobs(SEQUENCES), native(new, SEQUENCES), dtype)
        prompts = [sequence[: len(sequence) // 2 + 1] for sequence in SEQUENCES]
        groups = worker.generate([Request(prompt, 2, seed=0) for prompt in prompts], Sampling(max_tokens=24))
        drawn = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
        scored = reference(new, [prompt + c.token_ids for prompt, c in drawn])
        theirs = [values[len(prompt) - 1 :] for (prompt, _), values in zip(drawn, scored, strict=True)]
        assert_close([c.logprobs for _, c in drawn], theirs, dtype)
    finally:
        worker.close()


DISPATCH = ("_is_amx_tile_supported", "_is_avx512_supported", "_is_avx512_bf16_supported")
"""Functions of `torch.cpu` by whose answers vLLM chooses its kernels on x86."""

INSTRUCTION_SETS = {
    "AMX": {"_is_amx_tile_supported": True},
    "AVX2": {"_is_amx_tile_supported": False, "_is_avx512_supported": False, "_is_avx512_bf16_supported": False},
}
"""Answers with which engines are started. The kernels for float32 run on any processor with AVX2."""

EXPERT_MODELS = ("deepseek_v3", "qwen3_moe", "mixtral")


@dataclass
class Served:
    """The record of vLLM serving one model in float32."""

    kernels: set[str]
    """vLLM's names of the kernels for attention and experts."""
    before: list[list[float]]
    """Log-probs [sequences][len - 1] of `SEQUENCES` with the first weights."""
    after: list[list[float]]
    """Log-probs [sequences][len - 1] of `SEQUENCES` with the second weights."""


def serve_each(answers: dict[str, bool], models: list[tuple[Path, Path]]) -> tuple[str, list[Served]]:
    """Serve models with vLLM, one at a time, in a process that reports another instruction set.

    Args:
        answers: functions of `torch.cpu`, and the answers that they give to vLLM.
        models: folders with the first and with the second weights.

    Returns:
        The backend that vLLM prefers for latent attention with these answers, and the results per model.
    """
    for function, answer in answers.items():
        setattr(torch.cpu, function, partial(bool, answer))
    served = []
    for old, new in models:
        setup = EngineSetup(context_tokens=CONTEXT, max_sequences=8)
        worker = RolloutWorker("vllm", engine_config("vllm")(), old, setup)
        (kernels,) = worker.engine._llm.apply_model(kernel_names)
        before = worker.engine.logprobs(SEQUENCES)
        sync_weights(worker, dict(disk_tensors(load_model(new, torch.float32))))
        served.append(Served(kernels, before, worker.engine.logprobs(SEQUENCES)))
        worker.close()
    return latent_backends()[0], served


def kernel_names(model: nn.Module) -> set[str]:
    """Names of the kernels that vLLM chose for attention and for experts."""
    attention = {m.attn_backend.get_name() for m in model.modules() if hasattr(m, "attn_backend")}
    methods = [getattr(m, "quant_method", None) for m in model.modules()]
    return attention | {method.experts_cls.__name__ for method in methods if hasattr(method, "experts_cls")}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are instruction sets of x86")
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_float32_has_the_same_kernels_with_every_instruction_set(instructions: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    models = [
        (write_model(tmp_path / f"{name} 0", TINY[name], 0), write_model(tmp_path / f"{name} 1", TINY[name], 1))
        for name in EXPERT_MODELS
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        preferred, served = process.submit(serve_each, INSTRUCTION_SETS[instructions], models).result()
    assert preferred.endswith(".AMXMLABackend") == (instructions == "AMX"), "without our option vLLM takes AMX_MLA"
    for name, (old, new), found in zip(EXPERT_MODELS, models, served, strict=True):
        attention = "CPU_MLA" if name == "deepseek_v3" else "CPU_ATTN"
        assert found.kernels == {attention, "CPUUnquantizedExperts"}
        assert_close(found.before, reference(old, SEQUENCES), "float32")
        assert_close(found.after, reference(new, SEQUENCES), "float32")


def latent_backends() -> tuple[str, str]:
    """The backend that vLLM prefers for latent attention, and the one that it takes with our option."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    layer: Any = SimpleNamespace(use_sparse=False, use_mla=True)
    preferred, ours = (current_platform.get_attn_backend_cls(b, layer) for b in (None, AttentionBackendEnum.CPU_MLA))
    return preferred, ours


@pytest.mark.parametrize("dtype", get_args(get_type_hints(EngineSetup)["dtype"]))
@pytest.mark.parametrize("answers", product([False, True], repeat=len(DISPATCH)))
def test_latent_attention_has_one_kernel_whatever_the_dtype_and_the_processor(
    answers: tuple[bool, ...], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function, answer in zip(DISPATCH, answers, strict=True):
        monkeypatch.setattr(torch.cpu, function, partial(bool, answer))
    setup = EngineSetup(context_tokens=CONTEXT, dtype=dtype)
    for name, values in TINY.items():
        options = vllm._device_options(write_config(tmp_path / name, values), vllm.Config(), setup)
        expected = "CPU_MLA" if name.startswith("deepseek_v3") else None
        assert options.get("attention_backend") == expected, name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are instruction sets of x86")
@pytest.mark.parametrize("answers", product([False, True], repeat=len(DISPATCH)))
def test_vllm_takes_the_kernel_that_the_option_names(
    answers: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    for function, answer in zip(DISPATCH, answers, strict=True):
        monkeypatch.setattr(torch.cpu, function, partial(bool, answer))
    preferred, ours = latent_backends()
    assert preferred.endswith(".AMXMLABackend") == answers[0], "without our option vLLM takes AMX_MLA"
    assert ours.endswith(".CPUMLABackend")


def test_vllms_platform_asks_for_no_other_instruction_set() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "platforms" / "cpu.py").read_text()
    assert set(re.findall(r"torch\.cpu\.(_is_\w+)", source)) == set(DISPATCH)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"n_head": 4}, "heads of size 16"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
        ("gpt2", {"n_positions": 95}, "supports 95 positions"),
        ("qwen2", {"head_dim": 64}, "head_dim is 64, but vLLM supports only hidden_size"),
        (
            "qwen2",
            {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1},
            "layer_types mixes full and sliding",
        ),
        ("qwen3", {"architectures": ["VisionLanguageForCausalLM"]}, "VisionLanguageForCausalLM"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true"),
        (
            "qwen3",
            {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1},
            "layer_types mixes full and sliding",
        ),
        ("qwen3_moe", {"hidden_size": 48}, "experts with hidden_size 48"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
        ("deepseek_v3", {"kv_lora_rank": 256}, "kv_lora_rank 256"),
        ("deepseek_v3", {"topk_method": None}, 'topk_method is null, but must be "noaux_tc"'),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"rms_norm_eps": 0.01}, "rms_norm_eps is 0.01"),
        ("qwen3_next", {"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim 3"),
        ("qwen3_next", {"linear_key_head_dim": 128}, "linear_key_head_dim 128 with linear_value_head_dim 64"),
        ("qwen3_next", {"layer_types": None, "full_attention_interval": 2, "linear_key_head_dim": 32}, "head_dim 32"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = write_config(tmp_path / "model", TINY[name] | changes)
    setup = EngineSetup(context_tokens=CONTEXT, dtype=DTYPES.get(name, "float32"))
    with pytest.raises(ValueError, match=message):
        check_engine("vllm", engine_config("vllm")(), folder, setup)


def test_vllm_refuses_models_that_read_images_and_names_the_engine_that_serves_them(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = write_config(tmp_path / "model", VLMConfig.tiny().to_hf())
    setup = EngineSetup(context_tokens=CONTEXT)
    with pytest.raises(ValueError, match="VisionLanguageForCausalLM.*Choose the engine `native`"):
        check_engine("vllm", engine_config("vllm")(), folder, setup)
    assert choose_engine(folder, setup)[0] == "native"
    check_engine("native", engine_config("native")(), folder, setup)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_shapes_are_not_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = write_config(tmp_path / "model", TINY[name])
    setup = EngineSetup(context_tokens=CONTEXT, dtype=DTYPES.get(name, "float32"))
    check_engine("vllm", engine_config("vllm")(), folder, setup)


@pytest.mark.parametrize(
    ("name", "page_bytes", "pages_of_a_sequence"),
    [
        ("gpt2", 32 * 4 * 2 * 2 * 32, 4 + 4),
        ("qwen2 with YaRN and a window, tied", 32 * 4 * 2 * 1 * 32, 5 + 5),
        ("qwen3", 32 * 4 * 2 * 2 * 32, 4 + 4),
        ("gemma3", 32 * 4 * 2 * 2 * 32, 5 + 4),
        ("mixtral", 32 * 4 * 2 * 2 * 32, 5 + 5),
        ("deepseek_v3", 32 * 4 * 576, 4 + 4),
        ("qwen3_next", 9 * 32 * 2 * 2 * 2 * 32, 1 + 1),
    ],
)
def test_memory_for_all_sequences_at_full_length(
    name: str, page_bytes: int, pages_of_a_sequence: int, tmp_path: Path
) -> None:
    shape = read_vllm_shape(write_config(tmp_path / "model", TINY[name]))
    setup = EngineSetup(context_tokens=CONTEXT, max_sequences=8, dtype=DTYPES.get(name, "float32"))
    assert kv_cache_bytes(shape, None, setup) == (8 * pages_of_a_sequence + 2) * page_bytes
