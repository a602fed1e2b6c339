"""ViT against transformers, and refused shapes and inputs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.checkpoint.load_classifier import load_classifier
from llmquest_rl.models.checkpoint.load_save import load_any_model, load_model, save_model
from llmquest_rl.models.vit import ViT, ViTConfig
from llmquest_rl.models.weight_map import disk_tensors
from tests.models.families import FAMILIES, write_reference

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
VARIANTS = FAMILIES["vit"].VARIANTS
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def images(config: ViTConfig, number: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, config.num_channels, *config.image_size, generator=generator)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ViT:
    model = load_any_model(folder, dtype)
    assert isinstance(model, ViT)
    return model


def fresh(config: ViTConfig, seed: int = 0) -> ViT:
    model = ViT(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@every_variant
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    folder = write_reference(tmp_path, ("vit", variant))
    model = load(folder)
    theirs = ViTForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()
    pixels = images(model.config)
    logits, expected = model.logits(pixels), theirs(pixels).logits
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0.0)
    features = theirs.vit(pixels).last_hidden_state
    torch.testing.assert_close(model.features(pixels), features, atol=1e-5, rtol=0.0)

    for output in (logits, expected):
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    gradients = dict(disk_tensors(model, [(name, grad) for name, grad in ours.items() if grad is not None]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    for key, gradient in load_file(tmp_path / "gradients" / "model.safetensors").items():
        scale = float(gradients[key].abs().max()) + 1e-3  # a key's bias has no gradient but rounding
        torch.testing.assert_close(gradients[key], gradient, atol=1e-4 * scale, rtol=0.0, msg=key)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = write_reference(tmp_path / "first", ("vit", variant), dtype)
    model = load(first, dtype)
    save_model(first, disk_tensors(model), tmp_path / "second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "second"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype
        assert torch.equal(tensor, after[key]), key
    assert (first / "config.json").read_bytes() == (tmp_path / "second" / "config.json").read_bytes()


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    model = fresh(ViTConfig.tiny())
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
    save_model(tmp_path, disk_tensors(model), tmp_path)
    theirs, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    pixels = images(model.config)
    torch.testing.assert_close(model.logits(pixels), theirs.eval()(pixels).logits, atol=1e-5, rtol=0.0)
    assert ViTConfig.from_hf(model.config.to_hf()) == model.config


@pytest.mark.parametrize(
    ("file", "count"), [("tiny-vit-32.json", 5_362_762), ("vit-base-patch16-224.json", 86_567_656)]
)
def test_parameters_of_published_shapes(file: str, count: int) -> None:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    values = json.loads((CONFIGS / file).read_text())
    with torch.device("meta"):
        ours = ViT(ViTConfig.from_hf(values))
        theirs = ViTForImageClassification(TheirConfig(**values))
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


def test_eight_images_are_learned_by_heart() -> None:
    model = fresh(ViTConfig.tiny(), seed=1).train()
    pixels, labels = images(model.config, 8), torch.arange(8)
    start = F.cross_entropy(model.logits(pixels), labels).item()
    assert start == pytest.approx(math.log(10), rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.logits(pixels), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if loss.item() < 0.04:
            break
    assert F.cross_entropy(model.logits(pixels), labels).item() < 0.05


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = fresh(ViTConfig.tiny())
        model.gradient_checkpointing = checkpointing
        model.logits(images(model.config)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"this ViT takes \[images, 3, 16, 16\]"):
        fresh(ViTConfig.tiny()).logits(torch.zeros(shape))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 30}, "image_size .* is not a multiple of patch_size"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"image_size": [16, 16, 16]}, "image_size"),
    ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_channels": 0}, "num_channels is 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob 0.1"),
    ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob 0.1"),
    ({"num_labels": 3}, "num_labels 3, but 10 names in id2label"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig.from_hf({**ViTConfig.tiny().to_hf(), **change})


def test_a_tower_without_classifier_is_no_checkpoint_of_this_class(tmp_path: Path) -> None:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTModel

    ViTModel(TheirConfig(**FAMILIES["vit"].BASE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture 'ViTModel', which is not supported"):
        load_any_model(tmp_path, torch.float32)


def test_it_is_no_language_model(tmp_path: Path) -> None:
    assert "ViTForImageClassification" in architectures()
    folder = write_reference(tmp_path, ("vit", "square"))
    with pytest.raises(ValueError, match="ViT, which is not a language model"):
        load_model(folder, torch.float32)


def test_a_batch_is_scored_in_the_order_of_its_images() -> None:
    model = fresh(ViTConfig.tiny())
    pixels, room = images(model.config, 3), [0] * model.config.num_tokens
    batch = collate([SequenceGroup(room, [[i]], images=pixels[i : i + 1]) for i in (2, 0, 1)])
    torch.testing.assert_close(model(batch).values, model.logits(pixels[[2, 0, 1]]), atol=1e-6, rtol=0.0)
    assert model(batch).aux == {}


@pytest.mark.parametrize(
    "groups",
    [
        [SequenceGroup([0] * 5, [[1]])],
        [SequenceGroup([0] * 5, [[1], [2]], images=torch.zeros(1, 3, 16, 16))],
        [SequenceGroup([0] * 5, [[1]], images=torch.zeros(2, 3, 16, 16))],
    ],
)
def test_one_image_for_each_label(groups: list[SequenceGroup]) -> None:
    with pytest.raises(ValueError, match=r"one image for each label, but the batch has \d images and \d labels"):
        fresh(ViTConfig.tiny())(collate(groups))


def test_labels_keep_their_names_and_others_get_a_head_of_zeros(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, ("vit", "square"))
    names = tuple(f"class {i}" for i in range(FAMILIES["vit"].BASE["num_labels"]))
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    same = load_classifier(folder, names, torch.float32)
    assert same.config.labels == load(folder).config.labels == names
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in load(folder).state_dict().items())
    two = load_classifier(folder, ("cat", "dog"), torch.float32)
    pixels = images(same.config)
    assert isinstance(two, ViT) and isinstance(same, ViT)
    assert two.logits(pixels).tolist() == [[0.0, 0.0]] * len(pixels)
    torch.testing.assert_close(two.features(pixels), same.features(pixels))
    assert two.config_fields["id2label"] == {"0": "cat", "1": "dog"}
    with pytest.raises(ValueError, match="in this order: list them in the same order"):
        load_classifier(folder, names[::-1], torch.float32)
