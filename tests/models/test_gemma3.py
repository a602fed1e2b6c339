"""Gemma 3 beyond the tests of all families: rounding, windows, soft caps, old configurations, refused shapes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmquest_rl.batch import Layout, SequenceGroup, collate
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.generation.packed_weights import pack_model
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.norm import OffsetRMSNorm
from llmquest_rl.models.checkpoint.load_save import load_model, new_model
from llmquest_rl.models.checkpoint.parity import parity
from llmquest_rl.models.gemma3 import FULL, HF, SLIDING, Gemma3, Gemma3Config
from llmquest_rl.types import Request, Sampling
from tests.models.families import write_reference

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]


def logits(model: Gemma3, tokens: Tensor) -> Tensor:
    """Return the logits `[tokens, vocab]` of one text."""
    layout = Layout((len(tokens),), (-1,))
    return model.logits(model.hidden(tokens, layout.positions(), PackedAttention(layout, "cpu")).states)


def tiny(**changes: Any) -> Gemma3:
    model = Gemma3(Gemma3Config.from_hf({**Gemma3Config.tiny().to_hf(), **changes}))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform
    return model


def test_norms_start_where_they_change_nothing() -> None:
    model = tiny()
    norms = [module for module in model.modules() if isinstance(module, OffsetRMSNorm)]
    assert len(norms) == 6 * 2 + 1
    assert not any(bool(norm.weight.any()) for norm in norms)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(5 * 0.02, rel=0.05)


def test_embedding_scale_is_rounded_to_the_weights() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = tiny(hidden_size=3072, intermediate_size=8, num_hidden_layers=1, layer_types=[FULL]).bfloat16()
    theirs = Gemma3TextScaledWordEmbedding(256, 3072, 0, embed_scale=3072**0.5).bfloat16()
    theirs.weight = model.embedding.weight
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits(model, torch.arange(16))
        assert torch.equal(seen[0], theirs(torch.arange(16)))
        assert torch.equal(seen[0], (model.embedding.weight[:16].float() * 55.5).bfloat16())  # sqrt(3072) = 55.43


def test_a_sliding_layer_sees_its_window_and_no_more() -> None:
    """Two layers of window 8 reach back 14 tokens: a change affects this token and the next 14, and no others."""
    tokens = torch.arange(40)
    for kinds, reach in (([SLIDING, SLIDING], 14), ([SLIDING, FULL], 39)):
        model = tiny(layer_types=kinds)
        changed = tokens.clone()
        changed[3] = 200
        with torch.no_grad():
            differs = (logits(model, tokens) != logits(model, changed)).any(-1)
        assert differs.nonzero().flatten().tolist() == list(range(3, min(40, 3 + reach + 1)))


def test_soft_cap_of_attention_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of transformers has the cap, but its Gemma 3 does not pass it on; this test does."""
    from transformers import AutoModelForCausalLM
    from transformers.models.gemma3 import modeling_gemma3

    folder = write_reference(tmp_path, ("gemma3", "4 heads on 2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 0.5}))
    plain = modeling_gemma3.eager_attention_forward

    def capped(module: Any, *inputs: Any, **options: Any) -> Any:
        return plain(module, *inputs, softcap=module.attn_logit_softcapping, **options)

    tokens = torch.arange(1, 40)
    model = load_model(folder, torch.float32)
    assert isinstance(model, Gemma3)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours, without = logits(model, tokens), theirs(tokens[None]).logits[0]
        monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
        expected = theirs(tokens[None]).logits[0]
    assert float((without - expected).abs().max()) > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_generation_past_the_window(packed: bool) -> None:
    """With both soft caps and a cache of 8 tokens that wraps around, log-probs equal those of a packed forward pass."""
    model = tiny(attn_logit_softcapping=0.7, final_logit_softcapping=3.0).requires_grad_(False)
    prompts = [list(range(1, length)) for length in (4, 9, 31)]
    if packed:
        pack_model(model)
    generator = NativeGenerator(model, frozenset(), 96, max_sequences=4)
    requests = [Request(prompt, 2, seed=seed) for seed, prompt in enumerate(prompts)]
    groups = generator.generate(requests, Sampling(max_tokens=25))
    batch = collate(
        [SequenceGroup(r.prompt_ids, [c.token_ids for c in g]) for r, g in zip(requests, groups, strict=True)]
    )
    given = torch.tensor([value for group in groups for completion in group for value in completion.logprobs])
    torch.testing.assert_close(given, model(batch).logprobs, atol=1e-5, rtol=0.0)


OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "two bases": {"rope_theta": 5000.0, "rope_local_base_freq": 300.0, "rope_scaling": None},
    "scaling is for full layers": {
        "rope_theta": 5000.0,
        "rope_local_base_freq": 300.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "bases left out": {},
    "a period of layers": {"layer_types": None, "sliding_window_pattern": 2},
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_configs_of_transformers_4(name: str, tmp_path: Path) -> None:
    folder = write_reference(tmp_path, ("gemma3", "two rotary bases, linear scaling"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config["torch_dtype"] = config.pop("dtype")
    changed = {key: value for key, value in {**config, **OLD_CONFIGS[name]}.items() if key == "rope_scaling" or value}
    (folder / "config.json").write_text(json.dumps(changed))
    assert parity(folder).worst < 1e-5


def test_config_round_trip() -> None:
    config = Gemma3Config.tiny()
    assert Gemma3Config.from_hf(config.to_hf()) == config
    assert Gemma3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_older_spelling_of_the_rope_type() -> None:
    values = {**Gemma3Config.tiny().to_hf(), "rope_scaling": {"factor": 4.0, "type": "linear"}}
    del values["rope_parameters"]
    rope = Gemma3Config.from_hf(values).rope
    assert rope[FULL] == {"factor": 4.0, "rope_type": "linear", "rope_theta": 1e6}
    assert rope[SLIDING] == {"rope_type": "default", "rope_theta": 1e4}


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ({"hidden_activation": "wavy"}, "hidden_activation 'wavy' is not implemented"),
    ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"head_dim": 31}, "head_dim 31 is odd"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0 is not positive"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": None}, "sliding_window is None"),
    ({"layer_types": [SLIDING]}, "layer_types has 1 entries for num_hidden_layers 2"),
    ({"layer_types": [SLIDING, "linear_attention"]}, r"layer_types holds \['linear_attention'\]"),
    ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 is not positive"),
    ({"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0 is not positive"),
    ({"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, r"rope_parameters holds \['rope_theta', 'rope"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gemma3Config.from_hf({**Gemma3Config.tiny().to_hf(), **change})


@pytest.mark.parametrize("field", ["vocab_size", "head_dim", "query_pre_attn_scalar", "num_hidden_layers"])
def test_missing_field(field: str) -> None:
    values = Gemma3Config.tiny().to_hf()
    del values[field]
    with pytest.raises(ValueError, match=f"config.json of a Gemma 3 lacks '{field}'"):
        Gemma3Config.from_hf({**values, "layer_types": None})


def test_a_window_is_needed_by_sliding_layers_alone() -> None:
    values = {**Gemma3Config.tiny().to_hf(), "layer_types": [FULL, FULL], "sliding_window": None}
    assert Gemma3Config.from_hf(values).window is None


def write_multimodal(folder: Path) -> Tensor:
    """Write a tiny checkpoint with a vision tower; return the weight of `up_proj` in layer 0 of its text part."""
    from transformers import Gemma3Config as WholeConfig
    from transformers import Gemma3ForConditionalGeneration

    text = {**Gemma3Config.tiny().to_hf(), "vocab_size": 101}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 100, "boi_token_index": 99, "eoi_token_index": 98, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(WholeConfig(text_config=text, vision_config=vision, **tokens)).save_pretrained(
        folder
    )
    weight: Tensor = load_file(folder / "model.safetensors")["language_model.model.layers.0.mlp.up_proj.weight"]
    return weight


def test_multimodal_checkpoints_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    source, target = tmp_path / "whole", tmp_path / "text"
    weight = write_multimodal(source)
    with pytest.raises(ValueError, match=r"Gemma3ForConditionalGeneration.*docs/models/gemma3\.md"):
        load_model(source, torch.float32)
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models/gemma3.md").read_text(), re.DOTALL)
    exec(recipe, {"SOURCE": source, "TARGET": target})
    model = load_model(target, torch.float32)
    assert torch.equal(model.get_parameter("blocks.0.mlp.up.weight"), weight)
    assert parity(target).worst < 1e-5


@pytest.mark.parametrize(("name", "parameters"), [("gemma-3-270m", 268098176), ("gemma-3-1b", 999885952)])
def test_published_sizes(name: str, parameters: int) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    values = json.loads((ROOT / "configs/models" / f"{name}.json").read_text())
    assert values["architectures"] == [HF.architecture]
    with torch.device("meta"):
        models = (Gemma3(Gemma3Config.from_hf(values)), Gemma3ForCausalLM(Gemma3TextConfig(**values)))
    assert [sum(weight.numel() for weight in model.parameters()) for model in models] == [parameters] * 2


def test_new_models_are_about_uniform(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Gemma3Config.tiny().to_hf()))
    model = new_model(tmp_path, torch.float32)
    assert isinstance(model, Gemma3)
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=logits(model, torch.arange(20))).entropy()
    assert float(entropy.mean()) == pytest.approx(torch.tensor(256.0).log().item(), abs=0.05)
