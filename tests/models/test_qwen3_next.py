"""Qwen3-Next beyond the tests of all families: texts longer than a chunk, files with an MTP module, the loss of the
routers, random weights, rounding, refused shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout, SequenceGroup, collate
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import SlotCache
from llmquest_rl.layers.norm import OffsetRMSNorm
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import check_weights, load_model, new_model, save_model
from llmquest_rl.models.config.qwen3_next import FULL, LINEAR, Qwen3NextConfig
from llmquest_rl.models.qwen3_next import GatedDeltaNet, Qwen3Next
from llmquest_rl.models.weight_map import disk_tensors
from tests.models.families import tiny_folder, write_reference

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
CASE = ("qwen3_next", "2 value heads on each of 2")
ARCHITECTURE = "Qwen3NextForCausalLM"


def random_tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(101, (length,), generator=generator) for length in lengths]


def packed_logits(model: CausalLM, segments: list[Tensor], parents: tuple[int, ...]) -> list[Tensor]:
    layout = Layout(tuple(len(segment) for segment in segments), parents)
    states = model.hidden(torch.cat(segments), layout.positions(), PackedAttention(layout, "cpu")).states
    return list(model.logits(states).split(layout.lengths))


@torch.no_grad()
def test_texts_longer_than_a_chunk(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_reference(tmp_path, CASE)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompt, *continuations = random_tokens(70, 1, 64, 190)
    ours = packed_logits(load_model(folder, torch.float32), [prompt, *continuations], (-1, 0, 0, 0))
    for logits, continuation in zip(ours[1:], continuations, strict=True):
        expected = theirs(torch.cat((prompt, continuation))[None]).logits[0, len(prompt) :]
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0.0)


@torch.no_grad()
def test_generation_after_prompts_longer_than_a_chunk(tmp_path: Path) -> None:
    """Decoding continues the states of the chunks, for two completions of the first prompt and one of the second."""
    model = load_model(write_reference(tmp_path, CASE), torch.float32)
    *prompts, a, b, c = random_tokens(130, 64, 5, 5, 5)
    expected = packed_logits(model, [*prompts, a, b, c], (-1, -1, 0, 0, 1))[2:]
    layout = Layout((130, 64), (-1, -1))
    prompt_cache, tails = SlotCache(2, 130), SlotCache(3, 5)
    model.hidden(torch.cat(prompts), layout.positions(), PrefillContext(prompt_cache, layout, (0, 1)))
    for step in range(5):
        context = DecodeContext(prompt_cache, (130, 64), tails, (step,) * 3, (0, 0, 1))
        tokens = torch.stack((a[step], b[step], c[step]))
        states = model.hidden(tokens, torch.tensor((130, 130, 64)) + step, context).states
        wanted = torch.stack([logits[step] for logits in expected])
        torch.testing.assert_close(model.logits(states), wanted, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_bfloat16_is_rounded_as_in_transformers(tmp_path: Path) -> None:
    """Rounding in another place would have an error as large as that of bfloat16 itself."""
    from transformers import AutoModelForCausalLM

    folder = write_reference(tmp_path, CASE, torch.bfloat16)
    (tokens,) = random_tokens(50)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    reference, wide = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain)(tokens[None]).logits[0]
        for dtype in (torch.bfloat16, torch.float32)
    )
    (ours,) = packed_logits(load_model(folder, torch.bfloat16), [tokens], (-1,))
    apart, rounding = (ours.float() - reference.float()).abs().mean(), (reference.float() - wide).abs().mean()
    assert 0 < float(apart) < 0.5 * float(rounding)


def add_prediction(folder: Path) -> dict[str, Tensor]:
    """Write `mtp.*` with the other weights, as in the published files. Returns these weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    size = tensors["model.norm.weight"].shape[0]
    layer = "model.layers.1."  # a full one
    further = {key.replace(layer, "mtp.layers.0."): value for key, value in tensors.items() if key.startswith(layer)}
    further = {key: torch.randn_like(value) for key, value in further.items()}
    further["mtp.fc.weight"] = torch.randn(size, 2 * size).to(tensors["model.norm.weight"])
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        further[f"mtp.{name}.weight"] = torch.randn(size).to(tensors["model.norm.weight"])
    save_file({**tensors, **further}, folder / "model.safetensors", metadata={"format": "pt"})
    return further


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_further_prediction_is_read_kept_and_written(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write_reference(tmp_path / "first", CASE, dtype)
    plain = load_model(folder, dtype)
    further = add_prediction(folder)
    check_weights(folder)
    model = load_model(folder, dtype)
    save_model(folder, disk_tensors(model), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() >= further.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in plain.named_parameters()}
    (tokens,) = random_tokens(20)
    assert torch.equal(packed_logits(model, [tokens], (-1,))[0], packed_logits(plain, [tokens], (-1,))[0])


def test_a_part_of_further_prediction_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_reference(tmp_path, CASE)
    add_prediction(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing mtp\.layers\.0\.self_attn\.q_norm\.weight"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_balance_loss(coefficient: float) -> None:
    """With one layer with experts it equals the loss of transformers divided by the experts per token."""
    from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

    values = Qwen3NextConfig.tiny().to_hf() | {"mlp_only_layers": [0], "router_aux_loss_coef": coefficient}
    config = Qwen3NextConfig.from_hf(values)
    model = Qwen3Next(config)
    model.init_weights(torch.Generator().manual_seed(0))
    logits: list[Tensor] = []
    model.blocks[1].get_submodule("mlp.router").register_forward_hook(lambda m, i, out: logits.append(out.logits))
    batch = collate([SequenceGroup([1, 2, 3], [[4, 5], [6, 7, 8]])])
    aux = model(batch).aux
    expected = load_balancing_loss_func((logits[0],), config.num_experts, config.num_experts_per_tok)
    assert isinstance(expected, Tensor)
    assert ("balance" in aux) == (coefficient > 0)
    if coefficient:
        torch.testing.assert_close(aux["balance"], coefficient * expected / config.num_experts_per_tok)
        aux["balance"].backward()
        assert float(model.blocks[1].get_parameter("mlp.router.weight").grad.abs().max()) > 0  # type: ignore[union-attr]
    assert model.eval()(batch).aux == {}


def test_random_weights(tmp_path: Path) -> None:
    """Weights start as in transformers: decay rates from 0.01 to 16, offsets of norms at 0."""
    model = new_model(tiny_folder(tmp_path, ARCHITECTURE), torch.float32, seed=3)
    again = new_model(tmp_path, torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for module in model.modules():
        if isinstance(module, OffsetRMSNorm):
            assert not bool(module.weight.any())
        if isinstance(module, GatedDeltaNet):
            rates = module.A_log.exp()
            assert bool(((rates > 0.01) & (rates < 16)).all())
            assert len(rates.unique()) == len(rates)
            assert bool((module.dt_bias == 1).all())
            assert bool((module.norm.weight == 1).all())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"linear_num_key_heads": 3}, "linear_num_value_heads 2 is not a multiple of linear_num_key_heads 3"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
    ({"linear_key_head_dim": 0}, "linear_key_head_dim is 0"),
    ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    ({"mlp_only_layers": [2]}, r"mlp_only_layers \[2\] are not among the 2 layers"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef -0.1 is below 0"),
    ({"layer_types": [LINEAR]}, "layer_types has 1 entries for num_hidden_layers 2"),
    ({"layer_types": [LINEAR, "sliding_attention"]}, "layer_types holds .'sliding_attention'."),
    ({"layer_types": None, "full_attention_interval": -1}, "full_attention_interval is -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "partial_rotary_factor 0.1 gives 3 rotated dimensions"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3NextConfig.from_hf({**Qwen3NextConfig.tiny().to_hf(), **change})


def test_missing_fields_are_named() -> None:
    values = Qwen3NextConfig.tiny().to_hf()
    del values["linear_key_head_dim"], values["num_hidden_layers"]
    with pytest.raises(ValueError, match="lacks linear_key_head_dim, num_hidden_layers"):
        Qwen3NextConfig.from_hf(values)


def test_published_shape() -> None:
    """The model has as many parameters as in transformers, which does not have `mtp.*`."""
    from transformers import Qwen3NextConfig as TheirConfig
    from transformers import Qwen3NextForCausalLM

    values = json.loads((CONFIGS / "qwen3-next-80b-a3b.json").read_text())
    config = Qwen3NextConfig.from_hf(values)
    theirs = TheirConfig(**values)
    assert list(config.layer_types) == theirs.layer_types == ([LINEAR] * 3 + [FULL]) * 12
    assert config.rope == {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    with torch.device("meta"):
        counts = [sum(p.numel() for p in m.parameters()) for m in (Qwen3Next(config), Qwen3NextForCausalLM(theirs))]
    assert counts == [79_674_391_296] * 2
