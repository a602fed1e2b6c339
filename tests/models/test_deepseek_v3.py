"""DeepSeek-V3 beyond logits: multi-token prediction against transformers, router biases, files, shapes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.layers.moe.moe import SigmoidRouter
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.config.deepseek_v3 import DeepseekV3Config
from llmquest_rl.models.deepseek_v3 import DeepseekV3
from llmquest_rl.models.weight_map import disk_tensors, named_weights

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[2] / "configs" / "models"

TINY = replace(
    DeepseekV3Config.tiny(),
    vocab_size=101,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    initializer_range=0.15,
    num_mtp_layers=2,
)

GROUPS = [
    SequenceGroup([5, 9, 2, 7], [[3, 8], [1, 1, 4, 6, 2], [9]]),
    SequenceGroup([], [[4, 8, 15, 16, 23, 42]]),
    SequenceGroup([6, 14], [[], [2, 3, 4, 5, 18]], mask=[[], [True, False, True, True, False]]),
    SequenceGroup([11, 3], [[7]]),
]


def fresh(folder: Path, config: DeepseekV3Config = TINY) -> DeepseekV3:
    """Create a model as a run does, with router biases that change the choice of experts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    model = new_model(folder, torch.float32, seed=1)
    assert isinstance(model, DeepseekV3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.normal_(0.0, 0.2, generator=generator)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2, generator=generator)
    return model.train()


def saved(folder: Path, model: DeepseekV3) -> Path:
    save_model(folder, disk_tensors(model), folder / "saved")
    return folder / "saved"


def same(tensor: Tensor) -> None:
    """The sum over all processes, if there is only one."""


# Multi-token prediction


def reference_losses(folder: Path) -> tuple[torch.nn.Module, list[Tensor]]:
    """Compute the cross-entropy of each depth (eq. 24) with the modules of transformers, in float64, per sequence."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.[{TINY.num_layers}-9].*"]  # where modules lie
    theirs, mtp = theirs.double(), MtpModel.from_pretrained(theirs).double()
    sums = [torch.zeros((), dtype=torch.float64) for _ in mtp.layers]
    num_targets = 0
    for group in GROUPS:
        for i, completion in enumerate(group.completions):
            mask = [False] * len(group.prompt) + (group.mask[i] if group.mask else [True] * len(completion))
            mask[:1] = [False]
            num_targets += sum(mask)
            ids = torch.tensor([group.prompt + completion])
            states = theirs.model(ids).last_hidden_state
            for k, module in enumerate(mtp.layers, start=1):
                length = ids.shape[1] - k
                if length < 1:
                    break
                states = module(
                    theirs.model.embed_tokens(ids[:, k:]),
                    states[:, :length],
                    position_embeddings=theirs.model.rotary_emb(states, torch.arange(k, k + length)[None]),
                    attention_mask=torch.full((1, 1, length, length), -torch.inf, dtype=torch.float64).triu(1),
                    position_ids=None,
                    past_key_values=None,
                )
                logprobs = theirs.lm_head(states[0, :-1]).log_softmax(-1)
                chosen = logprobs.gather(-1, ids[0, k + 1 :, None])[:, 0]
                sums[k - 1] = sums[k - 1] - chosen[torch.tensor(mask[k + 1 :], dtype=torch.bool)].sum()
    return theirs, [total / num_targets for total in sums]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_mtp_equals_transformers_modules(depth: int, shared: bool, tmp_path: Path) -> None:
    """Loss and gradients agree, for packed sequences with masks, and prompts that are separate or shared."""
    model = fresh(tmp_path, replace(TINY, num_mtp_layers=depth, mtp_loss_weight=0.7))
    theirs, losses = reference_losses(saved(tmp_path, model))
    batch = collate(GROUPS if shared else [part for group in GROUPS for part in group.expanded()])
    loss = model(batch).aux["mtp"]
    expected = 0.7 / depth * torch.stack(losses).sum()
    assert float(expected.detach()) > 0.5
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0.0)
    loss.backward()
    expected.backward()
    found = dict(disk_tensors(model, [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]))
    for name, parameter in theirs.named_parameters():
        if name in found and parameter.grad is not None:
            gradient, scale = parameter.grad.float(), float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * scale + 1e-7, rtol=0.0, msg=name)
    assert float(found["model.embed_tokens.weight"].abs().max()) > 0
    assert all(f"model.layers.{TINY.num_layers + k}.eh_proj.weight" in found for k in range(depth))


def test_mtp_changes_nothing_else(tmp_path: Path) -> None:
    """Log-probs equal those of the model without the modules; the modules do not change them."""
    model = fresh(tmp_path)
    plain = DeepseekV3(replace(TINY, num_mtp_layers=0))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    batch = collate(GROUPS)
    with_modules, without = model(batch), plain(batch)
    assert torch.equal(with_modules.logprobs, without.logprobs)
    assert set(with_modules.aux) == {"mtp", "balance"}
    assert set(without.aux) == {"balance"}


def test_mtp_is_for_training_alone(tmp_path: Path) -> None:
    model = fresh(tmp_path)
    with torch.no_grad():
        assert model(collate(GROUPS)).aux == {}
    assert model.eval()(collate(GROUPS)).aux == {}


def test_no_weight_freezes_the_modules(tmp_path: Path) -> None:
    model = fresh(tmp_path, replace(TINY, mtp_loss_weight=0.0))
    output = model(collate(GROUPS))
    assert set(output.aux) == {"balance"}
    (-output.logprobs.sum() + output.aux["balance"]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (not name.startswith("mtp.")), name
    assert model.after_update(True, same)["moe/max_vio"] >= 0


@pytest.mark.parametrize(
    "groups", [[SequenceGroup([1], [[3]])], [SequenceGroup([1], [[]])], [SequenceGroup([], [[5]])]]
)
def test_too_short_for_mtp(groups: list[SequenceGroup], tmp_path: Path) -> None:
    """Without tokens to predict further ahead, the loss and the gradients of the modules are 0, not missing."""
    model = fresh(tmp_path)
    output = model(collate(groups))
    assert float(output.aux["mtp"].detach()) == 0.0
    (output.logprobs.sum() + sum(output.aux.values())).backward()
    assert all(p.grad is not None and not bool(p.grad.any()) for n, p in model.named_parameters() if "mtp." in n)


# Files


def test_modules_are_written_with_their_copies_and_read_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = fresh(tmp_path)
    folder = saved(tmp_path, model)
    tensors = load_file(folder / "model.safetensors")
    layers = [f"model.layers.{TINY.num_layers + k}" for k in range(2)]
    for layer in layers:
        assert torch.equal(tensors[f"{layer}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
        assert torch.equal(tensors[f"{layer}.shared_head.head.weight"], tensors["lm_head.weight"])
        assert {f"{layer}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")} <= set(tensors)
    again = dict(named_weights(load_model(folder, torch.float32)))
    assert all(torch.equal(weight, again[name]) for name, weight in named_weights(model))

    copies = [f"{layer}.{name}.weight" for layer in layers for name in ("embed_tokens", "shared_head.head")]
    save_file({name: tensor for name, tensor in tensors.items() if name not in copies}, folder / "model.safetensors")
    load_model(folder, torch.float32)
    save_file({**tensors, copies[0]: tensors[copies[0]] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.2\.embed_tokens"):
        load_model(folder, torch.float32)


def test_modules_that_are_announced_may_be_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, fresh(tmp_path))
    tensors = load_file(folder / "model.safetensors")
    modules = ("model.layers.2.", "model.layers.3.")
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(modules)}
    save_file(without, folder / "model.safetensors")
    model = load_model(folder, torch.float32)
    assert model.config.num_mtp_layers == 0
    assert set(dict(disk_tensors(model))) == set(without)
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing model\.layers\.3\.eh_proj"):
        load_model(folder, torch.float32)


def test_the_bias_stays_float32(tmp_path: Path) -> None:
    folder = saved(tmp_path, fresh(tmp_path))
    model = load_model(folder, torch.bfloat16)
    assert {weight.dtype for name, weight in model.named_buffers()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    model.to(torch.float16)
    assert {weight.dtype for name, weight in model.named_buffers()} == {torch.float32}


# Router biases


def biases(model: DeepseekV3) -> list[Tensor]:
    routers = (module for module in model.modules() if isinstance(module, SigmoidRouter))
    return [router.get_buffer("e_score_correction_bias").clone() for router in routers]


def chosen(model: DeepseekV3, batch: TokenBatch) -> list[Tensor]:
    """Count how often each router chose each expert, from outside of the model."""
    counts = []

    def note(router: Any, inputs: Any, routing: Any) -> None:
        counts.append(torch.bincount(routing.experts.flatten(), minlength=TINY.n_routed_experts).double())

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, SigmoidRouter)]
    model(batch)
    for hook in hooks:
        hook.remove()
    model._load = None
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_follows_the_load_of_the_whole_update(checkpointing: bool, tmp_path: Path) -> None:
    """With two microbatches and another process: `bias += rate * sign(mean - count)`, once, also with checkpointing."""
    model = fresh(tmp_path, replace(TINY, router_bias_update_rate=0.25))
    model.gradient_checkpointing = checkpointing
    microbatches = [collate(GROUPS[:2]), collate(GROUPS[2:])]
    counts = [sum(parts) for parts in zip(*(chosen(model, batch) for batch in microbatches), strict=True)]
    before = biases(model)
    assert len(counts) == len(before) == 3, "one layer of the model and both modules"
    for batch in microbatches:
        output = model(batch)
        (output.logprobs.sum() + sum(output.aux.values())).backward()
    elsewhere = torch.zeros(TINY.n_routed_experts)
    elsewhere[3] = 40.0

    def all_reduce(tensor: Tensor) -> None:
        if tensor.dim() == 2:
            tensor.add_(elsewhere)

    metrics = model.after_update(True, all_reduce)
    totals = [count + elsewhere for count in counts]
    for old, new, total in zip(before, biases(model), totals, strict=True):
        torch.testing.assert_close(new, old + 0.25 * (total.mean() - total).sign().float(), atol=1e-6, rtol=0.0)
    worst = max(float(total.max() / total.mean()) - 1 for total in totals)
    assert metrics["moe/max_vio_worst"] == pytest.approx(worst)
    moved = biases(model)
    assert model.after_update(True, all_reduce) == {}
    assert all(torch.equal(a, b) for a, b in zip(moved, biases(model), strict=True))


def test_when_the_bias_stays(tmp_path: Path) -> None:
    model = fresh(tmp_path)
    before = biases(model)
    batch = collate(GROUPS)
    with torch.no_grad():
        model(batch)
    model.eval()(batch)
    model.after_update(True, same)
    model.train()(batch)
    model.after_update(False, same)
    still = fresh(tmp_path / "still", replace(TINY, router_bias_update_rate=0.0))
    at_rest = biases(still)
    still(batch)
    assert still.after_update(True, same)["moe/max_vio"] > 0
    unchanged = zip([*before, *at_rest], [*biases(model), *biases(still)], strict=True)
    assert all(torch.equal(a, b) for a, b in unchanged)


def test_the_bias_evens_out_the_load(tmp_path: Path) -> None:
    """If the biases send every token to the same experts, updates without gradients balance the loads."""
    model = fresh(tmp_path, replace(TINY, num_mtp_layers=0, router_bias_update_rate=0.05, n_group=1, topk_group=1))
    (router,) = (module for module in model.modules() if isinstance(module, SigmoidRouter))
    router.get_buffer("e_score_correction_bias").copy_(torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    generator = torch.Generator().manual_seed(0)
    batch = collate([SequenceGroup([], [torch.randint(101, (200,), generator=generator).tolist()])])
    violations = []
    for _ in range(60):
        model(batch)
        violations.append(model.after_update(True, same)["moe/max_vio"])
    assert violations[0] == pytest.approx(8 / 3 - 1)
    assert violations[-1] < 0.3


def test_the_balance_loss_is_scaled_and_summed_over_layers(tmp_path: Path) -> None:
    """It equals eq. 17 to 20 in float64 on the outputs of all routers, also those of the MTP modules."""
    model = fresh(tmp_path, replace(TINY, first_k_dense_replace=0, num_mtp_layers=1, aux_loss_alpha=0.3))
    sequences = {6: (slice(0, 4), slice(4, 6)), 4: (slice(0, 3), slice(3, 4))}  # by tokens: of the model, of the module
    batch = collate([SequenceGroup([], [[4, 8, 15, 16, 23]]), SequenceGroup([], [[42, 7, 9]])])
    expected = 0.0

    def add(router: SigmoidRouter, inputs: tuple[Tensor], routing: Any) -> None:
        nonlocal expected
        for part in sequences[len(inputs[0])]:
            scores = (inputs[0][part].double() @ router.weight.double().t()).sigmoid()
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)
            counts = torch.bincount(routing.experts[part].flatten(), minlength=8) * 8 / (3 * len(scores))
            expected += 0.3 * float((counts * share).sum().detach()) / 2

    for module in model.modules():
        if isinstance(module, SigmoidRouter):
            module.register_forward_hook(add)
    assert float(model(batch).aux["balance"].detach()) == pytest.approx(expected, abs=1e-6)


# Shapes


def values(**changes: Any) -> Mapping[str, Any]:
    return {**TINY.to_hf(), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_routed_experts 8 in n_group 3"),
        ({"n_group": 8, "topk_group": 8}, "at least 2 experts"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"kv_lora_rank": -1}, "kv_lora_rank"),
        ({"n_shared_experts": None}, "lacks n_shared_experts"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace -1"),
        ({"mtp_loss_weight": -0.1}, "mtp_loss_weight"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"seq_aux": False}, "seq_aux False"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantise"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepseekV3Config.from_hf(values(**changes))


def test_a_missing_field_is_named() -> None:
    content = dict(values())
    del content["q_lora_rank"], content["num_hidden_layers"]
    with pytest.raises(ValueError, match="lacks num_hidden_layers, q_lora_rank"):
        DeepseekV3Config.from_hf(content)
    assert DeepseekV3Config.from_hf(values(q_lora_rank=None)).q_lora_rank is None


@pytest.mark.parametrize(
    ("size", "main", "modules"),
    [("deepseek-v3", 671_026_404_352, 11_610_067_968), ("moonlight-16b-a3b", 15_960_108_544, 0)],
)
def test_published_sizes(size: str, main: int, modules: int) -> None:
    """The models have as many parameters as in transformers, 671B and 16B; the report has 11.5B for the MTP module."""
    from transformers import DeepseekV3Config as TheirConfig
    from transformers import DeepseekV3ForCausalLM

    content = json.loads((CONFIGS / f"{size}.json").read_text())
    config = DeepseekV3Config.from_hf(content)
    with torch.device("meta"):
        ours = DeepseekV3(config)
        theirs = DeepseekV3ForCausalLM(TheirConfig(**content))
    counts = {name: parameter.numel() for name, parameter in ours.named_parameters()}
    in_modules = sum(count for name, count in counts.items() if name.startswith("mtp."))
    assert in_modules == modules
    assert sum(counts.values()) - in_modules == main == sum(parameter.numel() for parameter in theirs.parameters())
    assert config.attention.scale == pytest.approx(theirs.model.layers[0].self_attn.scaling, rel=1e-12)
