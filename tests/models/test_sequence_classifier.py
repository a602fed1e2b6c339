"""Every decoder as a text classifier: against transformers, on disk, in a pack, and made from other folders."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM, ClassifierModel
from llmquest_rl.models.checkpoint.hub import check_model_files
from llmquest_rl.models.checkpoint.load_classifier import check_classifier, load_classifier, new_classifier
from llmquest_rl.models.checkpoint.load_save import load_any_model, load_model, save_model
from llmquest_rl.models.checkpoint.parity import parity
from llmquest_rl.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig, decoders
from llmquest_rl.models.weight_map import disk_tensors, named_weights
from tests.models.checkpoint.test_parity import first_case, named_gradients, reference_gradients
from tests.models.families import CASES, FAMILIES, LANGUAGE_MODELS, case_name, tiny_folder, write_reference

torch.set_num_threads(1)

LABELS = ("no", "perhaps", "yes")
KINDS = {hf.architecture: name for name, hf in decoders().items()}
"""The architecture of the classifier, by that of its decoder."""

every_case = pytest.mark.parametrize("case", CASES, ids=case_name)
every_decoder = pytest.mark.parametrize("decoder", LANGUAGE_MODELS)

GROUPS = [
    SequenceGroup([], [[5, 9, 2, 7, 1]], mask=[[False] * 4 + [True]]),
    SequenceGroup([11, 3, 8], [[0], [7, 7, 2]], mask=[[True], [False, False, True]]),
    SequenceGroup([6, 6, 6, 6], [[4, 1]], mask=[[False, True]]),
]


def write_classifier(folder: Path, case: tuple[str, str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a random classifier with transformers; its labels have names."""
    kind = KINDS[FAMILIES[case[0]].MODEL]
    write_reference(folder, case, dtype, kind=kind, num_labels=len(LABELS), pad_token_id=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def load(folder: Path, labels: Sequence[str] = LABELS, seed: int = 0) -> SequenceClassifier:
    model = load_classifier(folder, labels, torch.float32, seed=seed)
    assert isinstance(model, SequenceClassifier)
    return model


def gradients(model: ClassifierModel, values: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (values * torch.linspace(0.5, 1.5, values.numel()).view_as(values)).sum().backward()
    return {name: gradient.clone() for name, gradient in named_gradients(model)}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=tolerance * scale + 1e-7, rtol=0.0, msg=name)


def test_every_decoder_has_a_classifier() -> None:
    writing = {name for name, hf in architectures().items() if issubclass(hf.model, CausalLM)}
    assert writing - set(KINDS) == {"VisionLanguageForCausalLM"}
    assert set(decoders()) <= set(architectures())


@every_case
def test_scores_equal_transformers(case: tuple[str, str], tmp_path: Path) -> None:
    report = parity(write_classifier(tmp_path, case))
    assert report.architecture == KINDS[FAMILIES[case[0]].MODEL]
    assert report.max_abs_logit > 0.1
    assert report.worst <= FAMILIES[case[0]].TOLERANCE


@every_case
def test_gradients_equal_transformers(case: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = write_classifier(tmp_path, case)
    model = load(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in (9, 40, 5)]
    groups = [SequenceGroup([], [[*text, i]], mask=[[False] * len(text) + [True]]) for i, text in enumerate(texts)]
    batch = collate(groups)
    F.cross_entropy(model(batch).values, batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    for i, text in enumerate(texts):
        theirs(torch.tensor([text]), labels=torch.tensor([i]), use_cache=False).loss.backward()
    tolerances = getattr(FAMILIES[case[0]], "GRADIENT_TOLERANCES", {})
    ours, expected = dict(disk_tensors(model, named_gradients(model))), reference_gradients(theirs, tmp_path / "grad")
    assert ours.keys() == expected.keys()
    for key in ours:
        assert_close({key: ours[key]}, {key: expected[key]}, tolerances.get(key.rpartition(".")[2], 1e-4))


@every_case
def test_round_trip_gives_the_same_bytes(case: tuple[str, str], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, second = write_classifier(tmp_path / f"{dtype}", case, dtype), tmp_path / f"{dtype} again"
        check_model_files(first)
        check_classifier(first, LABELS)
        model = load_classifier(first, LABELS, dtype)
        save_model(first, disk_tensors(model), second, config_fields=model.config_fields)
        assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
        kept = json.loads((second / "config.json").read_text())
        kept.pop("num_labels")  # added; transformers counts id2label
        assert kept == json.loads((first / "config.json").read_text())


@every_decoder
def test_packed_equals_separate_and_shared_prompts_equal_repeated_ones(decoder: str, tmp_path: Path) -> None:
    model = new_classifier(tiny_folder(tmp_path, decoder), LABELS, torch.float32, seed=2).eval()
    separate = [part for group in GROUPS for part in group.expanded()]
    expected = torch.cat([model(collate([group])).values for group in separate])
    assert float(expected.detach().std()) > 0.1
    for groups in [separate] + [GROUPS] * model.shares_prompts:
        packed = model(collate(groups)).values
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0.0)
        assert_close(gradients(model, packed), gradients(model, expected), 1e-4)
        expected = torch.cat([model(collate([group])).values for group in separate])


@every_decoder
def test_gradient_checkpointing_changes_nothing(decoder: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = new_classifier(tiny_folder(tmp_path, decoder), LABELS, torch.float32, seed=2).train()
        model.gradient_checkpointing = checkpointing
        found.append(gradients(model, model(collate(GROUPS[:1])).values))
    assert_close(found[1], found[0], 1e-5)


@every_decoder
def test_a_decoders_folder_gets_a_new_head(decoder: str, tmp_path: Path) -> None:
    """All other weights are those of the decoder; its output layer and MTP modules are dropped."""
    folder = write_reference(tmp_path / "decoder", first_case(decoder))
    source = dict(named_weights(load_model(folder, torch.float32)))
    check_classifier(folder, LABELS)
    model, again, other = load(folder), load(folder), load(folder, seed=1)
    kept = {name.removeprefix("decoder."): weight for name, weight in named_weights(model) if name != "score.weight"}
    assert all(torch.equal(weight, source[name]) for name, weight in kept.items())
    assert set(source) - set(kept) <= {"head.weight"}
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert not any(tensor.is_meta for _, tensor in named_weights(model))
    save_model(folder, disk_tensors(model), tmp_path / "saved", config_fields=model.config_fields)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [KINDS[decoder]]
    assert list(config["id2label"].values()) == list(LABELS)
    assert parity(tmp_path / "saved").worst <= FAMILIES[LANGUAGE_MODELS[decoder]].TOLERANCE
    reread = load(tmp_path / "saved")
    assert reread.config == model.config
    assert torch.equal(reread(collate(GROUPS)).values, model(collate(GROUPS)).values)


@pytest.mark.parametrize("decoder", ["DeepseekV3ForCausalLM", "Qwen3NextForCausalLM"])
def test_modules_that_predict_further_are_dropped(decoder: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "decoder", decoder)
    hf = architectures()[decoder]
    whole = hf.model(replace(hf.config.tiny(), num_mtp_layers=1))
    whole.init_weights(torch.Generator().manual_seed(0))
    (source / "config.json").write_text(json.dumps(whole.config.to_hf()))
    assert any("mtp." in name for name, _ in named_weights(whole))
    save_model(source, disk_tensors(whole), source)
    model = load(source)
    assert not any("mtp." in name for name, _ in named_weights(model))
    save_model(source, disk_tensors(model), tmp_path / "saved", config_fields=model.config_fields)
    assert parity(tmp_path / "saved").worst <= FAMILIES[LANGUAGE_MODELS[decoder]].TOLERANCE


def test_a_new_head_is_as_large_as_the_paper_says(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, first_case("LlamaForCausalLM"))
    model = load(folder, [str(i) for i in range(2000)])
    size = model.config.text.hidden_size
    assert float(model.score.weight.detach().std()) == pytest.approx((size + 1) ** -0.5, rel=0.02)


def test_another_number_of_labels_gets_a_new_head(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, first_case("Qwen2ForCausalLM"))
    three, two = load(folder), load(folder, ("low", "high"))
    assert torch.equal(three.score.weight, load_file(folder / "model.safetensors")["score.weight"])
    assert two.score.weight.shape == (2, three.score.weight.shape[1])
    assert two.config.labels == ("low", "high")
    first, second = (dict(named_weights(model.decoder)) for model in (three, two))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_other_names_for_as_many_labels_keep_the_head_and_the_same_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, first_case("LlamaForCausalLM"))
    model = load(folder, ("a", "b", "c"))
    assert torch.equal(model.score.weight, load(folder).score.weight)
    assert list(model.config_fields["id2label"].values()) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"has the labels no, perhaps, yes in this order: list them in the same order"):
        load(folder, ("yes", "no", "perhaps"))
    with pytest.raises(ValueError, match="in this order"):
        check_classifier(folder, ("yes", "no", "perhaps"))


def test_a_decoders_folder_must_be_whole(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, first_case("LlamaForCausalLM"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing model.norm.weight"):
        load(folder)


def test_no_classifier_is_made_of_a_vision_language_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "VisionLanguageForCausalLM")
    message = "holds a VisionLanguageForCausalLM, which cannot be turned into a classifier"
    with pytest.raises(ValueError, match=message):
        check_classifier(folder, LABELS)
    with pytest.raises(ValueError, match=message):
        new_classifier(folder, LABELS, torch.float32)


def test_it_is_no_language_model(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, first_case("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="SequenceClassifier, which is not a language model"):
        load_model(folder, torch.float32)
    assert isinstance(load_any_model(folder, torch.float32), SequenceClassifier)


def test_images_are_refused(tmp_path: Path) -> None:
    model = new_classifier(tiny_folder(tmp_path, "LlamaForCausalLM"), LABELS, torch.float32)
    batch = collate([SequenceGroup([1, 2], [[0]], images=torch.zeros(1, 3, 16, 16))])
    with pytest.raises(ValueError, match="LlamaForSequenceClassification reads text only"):
        model(batch)


def test_config_is_read_as_it_is_written() -> None:
    config = SequenceClassifierConfig.tiny()
    assert SequenceClassifierConfig.from_hf(config.to_hf()) == config
    values = {**config.to_hf(), "id2label": {"1": "b", "0": "a", "2": "c"}}
    assert SequenceClassifierConfig.from_hf(values).labels == ("a", "b", "c")
    without = {key: value for key, value in values.items() if key not in ("id2label", "label2id", "num_labels")}
    assert SequenceClassifierConfig.from_hf(without).labels == ("LABEL_0", "LABEL_1")
    with pytest.raises(ValueError, match=r"numbers its id2label \[0, 2, 3\]: expected 0 to 2"):
        SequenceClassifierConfig.from_hf({**values, "id2label": {"0": "a", "2": "b", "3": "c"}})


@every_decoder
def test_six_texts_are_learned_by_heart(decoder: str, tmp_path: Path) -> None:
    model = new_classifier(tiny_folder(tmp_path, decoder), LABELS, torch.float32, seed=1).train()
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.vocab_size, (6, 8), generator=generator).tolist()
    batch = collate([SequenceGroup([], [[*text, i % 3]], mask=[[False] * 8 + [True]]) for i, text in enumerate(texts)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    loss = math.inf
    for _ in range(150):
        optimizer.zero_grad()
        loss = step(model, batch)
        optimizer.step()
        model.after_update(True, lambda tensor: None)
        if loss < 0.03:
            break
    assert loss < 0.05
    assert torch.equal(model.eval()(batch).values.argmax(-1), batch.targets)


def step(model: ClassifierModel, batch: TokenBatch) -> float:
    """Run one backward pass; return the cross-entropy before it."""
    output = model(batch)
    loss = F.cross_entropy(output.values, batch.targets)
    (loss + sum(output.aux.values())).backward()
    return float(loss.detach())
