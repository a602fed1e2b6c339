"""vLLM on a CPU computes what transformers and our own models compute, for every architecture, before and after a live
update.

Each model gets a process of its own, because a process has room for one vLLM. The second set of weights belongs to
another random model, so that one tensor which stays behind shows.
"""

import json
from pathlib import Path
from typing import Any

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
from rollout.vllm_limits import kv_cache_bytes, read_shape
from tests.rollout.conftest import WorkerElsewhere, push
from tests.rollout.tiny_shapes import TINY

CONTEXT = 96
"""Tokens; all positions that the tiny GPT-2 has."""

DTYPES = {"qwen3_next": "bfloat16"}
"""Where it is not float32."""

TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (0.15, 0.02)}
"""Nats: the largest difference, and the mean one. transformers in bfloat16 is as far from itself in float32."""

SEQUENCES = [[(7 * i * i + 3 * i + 5) % 120 + 3 for i in range(length)] for length in (CONTEXT, 60, 33, 7)]


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_model(folder: Path, values: dict[str, Any], seed: int) -> Path:
    """A random model as transformers saves it; biases, norms and buffers are random, too, so that none can be left out.

    Its config.json is the one that was asked for: transformers drops fields that it has no use for.
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
    """The same by our own model."""
    generator = NativeGenerator(load_model(folder, torch.float32).eval(), frozenset(), CONTEXT)
    return generator.logprobs(sequences)


def assert_close(ours: list[list[float]], theirs: list[list[float]], dtype: str) -> None:
    """Log-probs of several sequences, compared as one."""
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
        assert_close(worker.logprobs(SEQUENCES), reference(old, SEQUENCES), dtype)
        assert_close(native(old, SEQUENCES), reference(old, SEQUENCES), "float32")
        push(worker, dict(disk_tensors(load_model(new, torch.float32))))
        assert_close(worker.logprobs(SEQUENCES), reference(new, SEQUENCES), dtype)
        assert_close(worker.logprobs(SEQUENCES), native(new, SEQUENCES), dtype)
        prompts = [sequence[: len(sequence) // 2 + 1] for sequence in SEQUENCES]
        groups = worker.generate([Request(prompt, 2, seed=0) for prompt in prompts], Sampling(max_tokens=24))
        drawn = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
        scored = reference(new, [prompt + c.token_ids for prompt, c in drawn])
        theirs = [values[len(prompt) - 1 :] for (prompt, _), values in zip(drawn, scored, strict=True)]
        assert_close([c.logprobs for _, c in drawn], theirs, dtype)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"n_head": 4}, "heads of size 16"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
        ("gpt2", {"n_positions": 95}, "supports 95 positions"),
        ("qwen2", {"head_dim": 64}, "head_dim is 64, and it computes hidden_size"),
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
        ("deepseek_v3", {"topk_method": None}, 'topk_method is null, and must be "noaux_tc"'),
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
    shape = read_shape(write_config(tmp_path / "model", TINY[name]))
    setup = EngineSetup(context_tokens=CONTEXT, max_sequences=8, dtype=DTYPES.get(name, "float32"))
    assert kv_cache_bytes(shape, None, setup) == (8 * pages_of_a_sequence + 2) * page_bytes
