"""Vision-language models: every decoder with images, against transformers, and refused inputs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmquest_rl.batch import Layout, SequenceGroup, collate
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import SlotCache
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.assemble_vlm import assemble
from llmquest_rl.models.checkpoint.load_save import load_any_model, load_model, new_model, save_model
from llmquest_rl.models.llama import Llama, LlamaConfig
from llmquest_rl.models.vit import ViTConfig
from llmquest_rl.models.vlm import HF, VLM, VLMConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.types import Request, Sampling
from tests.models.families import FAMILIES, LANGUAGE_MODELS, write_reference

torch.set_num_threads(1)

TOWER = replace(ViTConfig.tiny(), labels=())
MARK = 255
"""The image token."""
IMAGE = [MARK] * TOWER.num_tokens

every_decoder = pytest.mark.parametrize("decoder", LANGUAGE_MODELS)


def fresh(decoder: str = "LlamaForCausalLM", adapter: str = "mlp", frozen: tuple[str, ...] = (), seed: int = 0) -> VLM:
    config = VLMConfig(TOWER, architectures()[decoder].config.tiny(), adapter, MARK, frozen)
    model = VLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def far_from_uniform(model: VLM) -> VLM:
    """Draw random weights that are large enough to make differences visible."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def pictures(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def groups() -> list[SequenceGroup]:
    """Return groups with 0, 1 and 2 images, before and within text, with shared prompts and without a prompt."""
    return [
        SequenceGroup([*IMAGE, 1, 2], [[3, 4], [5, 6, 7]], images=pictures(1, 1)),
        SequenceGroup([7, 8], [[8, MARK, 9]]),
        SequenceGroup([*IMAGE, 3, *IMAGE, 4], [[4, 4], [9], [1, 2, 3]], images=pictures(2, 2)),
        SequenceGroup([], [[5, 6, 7, 8]]),
    ]


def gradients(model: VLM, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], relative: float) -> None:
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        scale = float(gradient.abs().max()) + 1e-3  # the bias of a key has no gradient but rounding
        torch.testing.assert_close(gradient, b[name], atol=relative * scale, rtol=0.0, msg=name)


@every_decoder
def test_packed_and_shared_equal_separate(decoder: str) -> None:
    model = far_from_uniform(fresh(decoder)).eval()
    parts = [part for group in groups() for part in group.expanded()]
    separate = torch.cat([model(collate([part])).logprobs for part in parts])
    expected = gradients(model, separate)
    assert {name for name, _ in model.named_parameters() if name.startswith(("vision", "adapter"))} <= expected.keys()
    packs = [parts, groups()] if model.shares_prompts else [parts]
    for pack in packs:
        logprobs = model(collate(pack)).logprobs
        torch.testing.assert_close(logprobs, separate, atol=5e-5, rtol=0.0)
        assert_same(gradients(model, logprobs), expected, 2e-4)


@every_decoder
def test_text_alone_is_the_decoder_alone(decoder: str) -> None:
    model = far_from_uniform(fresh(decoder)).eval()
    text = collate([SequenceGroup([1, 2, 3], [[4, 5], [6]]), SequenceGroup([], [[7, 8, 9]])])
    assert torch.equal(model(text).logprobs, model.decoder(text).logprobs)


@every_decoder
def test_an_image_changes_what_follows_it_and_nothing_else(decoder: str) -> None:
    model = far_from_uniform(fresh(decoder)).eval()
    pack = [part for group in groups() for part in group.expanded()]
    before = model(collate(pack)).logprobs
    changed = [replace(group, images=pictures(1, 9)) if i < 2 else group for i, group in enumerate(pack)]
    after = model(collate(changed)).logprobs
    assert not bool((before[:5] == after[:5]).any())
    torch.testing.assert_close(before[5:], after[5:], atol=1e-5, rtol=0.0)  # experts compute in other company


@every_decoder
def test_every_part_learns_and_checkpointing_changes_nothing(decoder: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = fresh(decoder).train()
        model.gradient_checkpointing = checkpointing
        output = model(collate(groups()))
        (-output.logprobs.mean() + sum(output.aux.values())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert isinstance(model.after_update(True, lambda tensor: None), dict)
    plain, again = found
    for name, gradient in plain.items():
        other = again[name]
        assert gradient is not None and other is not None, name
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5, msg=name)
        assert bool(gradient.any()) or not name.startswith(("vision", "adapter")) or name.endswith("key.bias"), name


def test_multi_token_prediction_sees_images() -> None:
    """The MTP modules embed the tokens again, shifted."""
    text = replace(architectures()["DeepseekV3ForCausalLM"].config.tiny(), num_mtp_layers=2)
    model = VLM(VLMConfig(TOWER, text, "mlp", MARK))
    model.init_weights(torch.Generator().manual_seed(0))
    far_from_uniform(model).train()
    pack = [SequenceGroup([1, *IMAGE, 2], [[3, 4, 5]], images=pictures(1, seed)) for seed in (1, 2)]
    both = model(collate(pack))
    alone = [model(collate([group])) for group in pack]
    name = next(name for name in both.aux if "mtp" in name)
    assert not torch.allclose(alone[0].aux[name], alone[1].aux[name], atol=1e-4)
    torch.testing.assert_close(both.aux[name], (alone[0].aux[name] + alone[1].aux[name]) / 2, atol=1e-5, rtol=0.0)


@every_decoder
def test_folder_round_trip(decoder: str, tmp_path: Path) -> None:
    config = fresh(decoder).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert HF.config.from_hf(config.to_hf()) == config
    save_model(tmp_path, disk_tensors(new_model(tmp_path, torch.bfloat16)), tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    assert isinstance(model, VLM)
    save_model(tmp_path, disk_tensors(model), tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert {key.partition(".")[0] for key in before} == {"vision_tower", "adapter", "language_model"}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype for key, tensor in before.items())
    for key, tensor in disk_tensors(model.decoder):
        assert torch.equal(before[f"language_model.{key}"], tensor)
    if config.text.tied:
        assert model.head.weight is model.decoder.get_parameter("embedding.weight")


def write_parts(folder: Path) -> tuple[Path, Path]:
    """Write a ViT and a Llama with transformers."""
    llama = next(iter(FAMILIES["llama"].VARIANTS))
    return write_reference(folder / "vit", ("vit", "square")), write_reference(folder / "llama", ("llama", llama))


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_logits_equal_transformers_on_fused_embeddings(adapter: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, ViTForImageClassification

    vision, language = write_parts(tmp_path)
    assemble(vision, language, tmp_path / "joint", image_token_id=100, adapter=adapter)
    model = load_model(tmp_path / "joint", torch.float32)
    assert isinstance(model, VLM)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.normal_(0.0, 0.2)
    tower = ViTForImageClassification.from_pretrained(vision, attn_implementation="eager").eval().vit
    theirs = LlamaForCausalLM.from_pretrained(language, attn_implementation="eager").eval()
    images = pictures(3)
    num = model.config.vision.num_tokens
    texts = [[100] * num + [1, 2, 3, 4], [5, 6, 7], [9, *[100] * num, 8, *[100] * num, 10, 11]]
    layout = Layout(tuple(map(len, texts)), (-1, -1, -1))
    tokens = torch.tensor([token for text in texts for token in text])
    with torch.no_grad():
        context = PackedAttention(layout, "cpu")
        states = model.hidden(tokens, layout.positions(), context, images, (1, 0, 2)).states
        features = model.adapter(tower(images).last_hidden_state)
        for i, (text, own) in enumerate(zip(texts, ([0], [], [1, 2]), strict=True)):
            embeddings = theirs.get_input_embeddings()(torch.tensor(text))
            embeddings[torch.tensor(text) == 100] = features[own].flatten(0, 1)
            expected = theirs(inputs_embeds=embeddings[None]).logits[0]
            ours = model.logits(states).split(layout.lengths)[i]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0.0)


@every_decoder
def test_prefill_with_images_and_decoding(decoder: str) -> None:
    """The cache treats vision tokens like others: later tokens equal those of one forward pass over everything."""
    model = far_from_uniform(fresh(decoder)).eval().requires_grad_(False)
    if not model.shares_prompts:
        pytest.skip("there is no forward over shared prompts to compare with")
    prompts, images, tails = [[*IMAGE, 1, 2], [3], [*IMAGE, *IMAGE]], pictures(3), [[4, MARK], [5, 6], [7, 8]]
    layout = Layout(tuple(map(len, prompts)), (-1,) * 3)
    kept, slots = (SlotCache(3, capacity) for capacity in (10, 2)), list(range(3))
    prompt_cache, tail_cache = kept
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    context = PrefillContext(prompt_cache, layout, slots)
    states = [model.hidden(tokens, layout.positions(), context, images, (1, 0, 2)).states[torch.tensor([6, 7, 17])]]
    for step in range(2):
        decode = DecodeContext(prompt_cache, list(layout.lengths), tail_cache, [step] * 3, slots)
        positions = torch.tensor(layout.lengths) + step
        states.append(model.hidden(torch.tensor([tail[step] for tail in tails]), positions, decode).states)
    whole = Layout((*layout.lengths, 2, 2, 2), (-1, -1, -1, 0, 1, 2))
    everything = torch.cat((tokens, torch.tensor(tails).flatten()))
    packed = PackedAttention(whole, "cpu")
    expected = model.hidden(everything, whole.positions(), packed, images, (1, 0, 2, 0, 0, 0)).states
    rows = torch.tensor([[6, 7, 17], [18, 20, 22], [19, 21, 23]])
    torch.testing.assert_close(torch.stack(states), expected[rows], atol=5e-5, rtol=0.0)


def test_the_native_engine_serves_its_text() -> None:
    model = far_from_uniform(fresh()).eval().requires_grad_(False)
    requests, sampling = [Request([1, 2, 3], 2, seed=1)], Sampling(max_tokens=8)
    both = [NativeGenerator(part, frozenset(), 32).generate(requests, sampling) for part in (model, model.decoder)]
    assert both[0] == both[1]


def test_eight_captions_are_learned_by_heart() -> None:
    """All prompts have the same tokens: only the image determines the caption."""
    model = fresh(seed=1).train()
    images = pictures(8)
    batch = collate(
        [SequenceGroup([*IMAGE, 1], [[10 + i, 20 + 3 * i, 50 - i]], images=images[i : i + 1]) for i in range(8)]
    )
    assert float(-model(batch).logprobs.mean().detach()) == pytest.approx(math.log(256), rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -model(batch).logprobs.mean()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.04:
            break
    assert float(-model(batch).logprobs.mean().detach()) < 0.05


def test_frozen_parts_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fresh(frozen=("vision.*", "decoder.norm.*")).config.to_hf()))
    model = new_model(tmp_path, torch.float32)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("vision.", "decoder.norm."))}
    model(collate(groups())).logprobs.sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in model.named_parameters())


def test_assembled_parts_are_those_of_their_folders(tmp_path: Path) -> None:
    vision, language = write_parts(tmp_path)
    (language / "tokenizer.json").write_text("words")
    special = json.loads((language / "config.json").read_text())
    (vision / "preprocessor_config.json").write_text("the tower's")
    (language / "preprocessor_config.json").write_text("the decoder's")
    assemble(vision, language, tmp_path / "joint", 100, "linear", ["vision.*"], torch.bfloat16, seed=3)
    model = load_model(tmp_path / "joint", torch.bfloat16)
    assert isinstance(model, VLM)
    assert (tmp_path / "joint" / "tokenizer.json").read_text() == "words"
    assert (tmp_path / "joint" / "preprocessor_config.json").read_text() == "the tower's"
    written = json.loads((tmp_path / "joint" / "config.json").read_text())
    assert written["eos_token_id"] == special["eos_token_id"] is not None
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    for part, folder in ((model.vision, vision), (model.decoder, language)):
        source = load_any_model(folder, torch.bfloat16).state_dict()
        own = part.state_dict()
        assert source.keys() - own.keys() <= {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, source[name]) for name, tensor in own.items())
    (vision / "model.safetensors").unlink()  # then the tower is random
    assemble(vision, language, tmp_path / "other", 100)
    load_model(tmp_path / "other", torch.float32)
    assemble(vision, language, tmp_path / "words", 100, tokenizer=vision)
    assert not (tmp_path / "words" / "tokenizer.json").exists(), "the other folder has none"
    for parts, message in (((language, language), "expected a Vision"), ((vision, vision), "expected a language")):
        with pytest.raises(ValueError, match=message):
            assemble(*parts, tmp_path / "never", 100)


WRONG: list[tuple[SequenceGroup, str]] = [
    (
        SequenceGroup([*IMAGE, MARK, 1], [[2]], images=pictures(1)),
        "segment 0 holds 6 image tokens .* 1 images need 5 each",
    ),
    (SequenceGroup([1], [[2]], images=pictures(1)), "segment 0 holds 0 image tokens"),
    (SequenceGroup([*IMAGE, 1], [[2]]), "segment 0 holds 5 image tokens .* 0 images"),
    (SequenceGroup([*IMAGE, 1], [[2]], images=torch.zeros(1, 3, 8, 8)), r"this ViT takes \[images, 3, 16, 16\]"),
]


@pytest.mark.parametrize(("group", "message"), WRONG)
def test_images_that_do_not_fit_their_tokens(group: SequenceGroup, message: str) -> None:
    model = fresh()
    with pytest.raises(ValueError, match=message):
        model(collate([group]))
    assert model(collate([SequenceGroup([1], [[2]])])).logprobs.shape == (1,)  # nothing is left of it


def test_images_of_the_wrong_prompt_are_seen() -> None:
    """The total number of image tokens is right, but not that of each segment."""
    pack = [
        SequenceGroup([*IMAGE, 1], [[2]], images=pictures(2)),
        SequenceGroup([*IMAGE, *IMAGE, 1], [[2]], images=pictures(1)),
    ]
    with pytest.raises(ValueError, match="segment 0 holds 5 image tokens"):
        fresh()(collate(pack))


def test_images_travel_with_a_batch() -> None:
    batch = collate(groups())
    assert batch.image_counts == (1, 0, 0, 0, 0, 2, 0, 0, 0, 0)
    assert batch.images is not None and torch.equal(batch.images, torch.cat((pictures(1, 1), pictures(2, 2))))
    moved = batch.to("meta").images
    assert moved is not None and moved.device.type == "meta"
    text = collate([groups()[1]])
    assert text.images is None and text.image_counts == () and text.to("meta").images is None
    repeated = collate([part for group in groups() for part in group.expanded()])
    assert repeated.image_counts == (1, 0, 1, 0, 0, 0, 2, 0, 2, 0, 2, 0, 0)
    with pytest.raises(ValueError, match="images but no prompt"):
        collate([SequenceGroup([], [[1, 2]], images=pictures(1))])
    with pytest.raises(ValueError, match="differ in size"):
        collate(
            [SequenceGroup([1], [[2]], images=pictures(1)), SequenceGroup([1], [[2]], images=torch.zeros(1, 3, 8, 8))]
        )


def test_no_image_at_all_is_text() -> None:
    model = fresh().eval()
    with_none, text = (collate([SequenceGroup([1, 2], [[3]], images=images)]) for images in (pictures(0), None))
    assert torch.equal(model(with_none).logprobs, model(text).logprobs)


def test_a_text_model_refuses_images() -> None:
    model: CausalLM = Llama(LlamaConfig.tiny())
    with pytest.raises(ValueError, match="Llama reads text only"):
        model(collate(groups()))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "q-former"}, "adapter 'q-former' is not implemented: expected one of linear, mlp"),
    ({"image_token_id": 256}, "image_token_id 256 is not in the vocabulary of 256"),
    ({"image_token_id": -1}, "image_token_id -1"),
    ({"vision_config": LlamaConfig.tiny().to_hf()}, "vision_config names LlamaForCausalLM"),
    (
        {"text_config": ViTConfig.tiny().to_hf()},
        "text_config names ViTForImageClassification, which is not a text decoder",
    ),
    (
        {"text_config": VLMConfig.tiny().to_hf()},
        "text_config names VisionLanguageForCausalLM, which is not a text decoder",
    ),
    ({"text_config": {"architectures": ["Unknown"]}}, "text_config names architecture 'Unknown'"),
    ({"frozen": ["tower.*"]}, r"frozen: 'tower.\*' matches no weight"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_configurations_that_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**VLMConfig.tiny().to_hf(), **change}))
    with pytest.raises(ValueError, match=message):
        new_model(tmp_path, torch.float32)


@pytest.mark.parametrize("field", ["vision_config", "text_config", "adapter", "image_token_id"])
def test_fields_that_are_missing(field: str) -> None:
    values = VLMConfig.tiny().to_hf()
    del values[field]
    with pytest.raises(ValueError, match=f"lacks '{field}'"):
        VLMConfig.from_hf(values)
