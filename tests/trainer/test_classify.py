"""Models that score through the real loop and the real learner: every decoder, and the Vision Transformer."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.models.checkpoint.load_classifier import load_classifier
from llmquest_rl.models.checkpoint.load_save import disk_shapes
from llmquest_rl.models.sequence_classifier import decoders
from llmquest_rl.models.vit import ViTConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives.classify import Classify
from rollout.engine import EngineSetup, check_engine, engine_config
from tests.models.families import LANGUAGE_MODELS, tiny_folder
from tests.trainer.conftest import Runs, assert_equal_runs, rows, saved
from tests.trainer.learner.learner_cases import Case, make_setup, run_group, run_steps, whole_weights
from tests.trainer.test_families import tiny_of
from trainer.cli.dry_run import dry_run
from trainer.cluster.worker_group import free_port
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner

LABELS = ("vowel", "consonant", "other")
VOWELS, OTHERS = "aeiou", "0123456789"


def letters(runs: Runs, count: int = 200, length: int = 6) -> Runs:
    """Random characters, to be judged by the last one that is no space: the end must be found and looked at."""
    generator = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz" + OTHERS
    lines = []
    for _ in range(count):
        text = "".join(generator.choices(alphabet, k=generator.randrange(1, length)))
        label = "vowel" if text[-1] in VOWELS else "other" if text[-1] in OTHERS else "consonant"
        lines.append(json.dumps({"text": text, "label": label}) + "\n")
    (runs.folder / "letters.jsonl").write_text("".join(lines))
    runs.values["objective"] = {"name": "classify", "labels": list(LABELS)}
    dataset = {"name": "labelled", "path": str(runs.folder / "letters.jsonl"), "validation_share": 0.2}
    runs.values["data"] = {"dataset": dataset, "eval_size": 40}
    runs.values["batch"] |= {"sequences_per_step": 8, "tokens_per_sequence": 64}
    return runs


def pictures(runs: Runs, folder: Path) -> Runs:
    """Runs that classify the colour of a shape with a Vision Transformer, whose folder has no tokenizer."""
    tiny_folder(folder, "ViTForImageClassification")
    runs.values["model"] = {"path": str(folder), "init": "random", "dtype": "float32"}
    runs.values["objective"] = {"name": "classify", "labels": ["red", "green", "blue", "yellow"]}
    task = {"name": "shapes", "ask": "colour", "size": 16, "held_out": 60}
    runs.values["data"] = {"dataset": {"name": "labelled", "task": task, "task_rows": 500}, "eval_size": 60}
    runs.values["batch"] |= {"sequences_per_step": 16, "tokens_per_sequence": 8}
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("decoder", LANGUAGE_MODELS)
def test_two_steps_from_a_decoders_folder(decoder: str, tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    folder = tiny_of(decoder, tiny_model, tmp_path / "family")
    run = letters(runs).train(f"model.path={folder}", "steps=2", "model.gradient_checkpointing=true")
    logged = rows(run)
    assert [row["train/sequences"] for row in logged] == [8, 8]
    assert logged[-1]["eval/sequences"] > 30
    assert 0 <= logged[-1]["eval/accuracy"] <= 1
    exported = run / "checkpoints" / "step-000002" / "model"
    config = json.loads((exported / "config.json").read_text())
    assert [decoders()[config["architectures"][0]].architecture] == [decoder]
    assert list(config["id2label"].values()) == list(LABELS)
    before, after = (dict(disk_tensors(load_classifier(path, LABELS, torch.float32))) for path in (folder, exported))
    assert before.keys() == after.keys()
    assert not torch.equal(before["score.weight"], after["score.weight"])
    assert any(not torch.equal(before[name], after[name]) for name in before if name != "score.weight")
    assert len([row for row in logged if "moe/max_vio" in row]) in (0, 2)


def test_what_the_end_of_a_text_says_is_learned(runs: Runs) -> None:
    """The texts are held out; a random guess is right less than 60 % of the time for every class."""
    run = letters(runs, 500).train("steps=150", "eval.every=50", "batch.sequences_per_step=32", "checkpoint.every=0")
    logged = rows(run)
    assert logged[0]["train/accuracy"] < 0.7
    assert logged[-1]["eval/accuracy"] >= 0.95
    assert logged[-1]["eval/loss"] < 0.25


def test_the_colour_of_a_picture_is_learned(runs: Runs, tmp_path: Path) -> None:
    """Held-out pictures; the export has no tokenizer either, and goes on."""
    pictures(runs, tmp_path / "vit")
    run = runs.train("steps=80", "eval.every=40", "checkpoint.every=80", "optimizer.lr=3e-3")
    last = rows(run)[-1]
    assert last["eval/accuracy"] >= 0.95
    exported = run / "checkpoints" / "step-000080" / "model"
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["num_labels"]) == (["ViTForImageClassification"], 4)
    assert config["id2label"] == {"0": "red", "1": "green", "2": "blue", "3": "yellow"}
    pretrained = (f"model.path={exported}", "model.init=pretrained", "optimizer.lr=1e-9", "eval.at_start=true")
    again = runs.train("steps=2", *pretrained)
    assert rows(again)[0]["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    other = runs.train("steps=2", *pretrained, "objective.labels=[red, green, blue, yellow, black]")
    assert rows(other)[0]["eval/loss"] == pytest.approx(math.log(5), rel=1e-6), "a new head is all 0"


def test_a_dry_run_needs_no_tokenizer_of_a_vision_transformer(runs: Runs, tmp_path: Path) -> None:
    results = {found.name: found for found in dry_run(pictures(runs, tmp_path / "vit").config())}
    assert results["tokenizer"].text == "none: the model reads only images"
    assert "6 to 6 tokens" in results["sequences"].text
    assert all(found.passed for found in results.values())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{name: sft, task: {name: arithmetic}}", "holds text, but the model reads images alone"),
        ("{name: labelled, task: {name: arithmetic}}", "reads one image .columns.images., but the row has 0"),
    ],
)
def test_a_vision_transformer_takes_no_text(dataset: str, message: str, runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pictures(runs, tmp_path / "vit").train(f"data.dataset={dataset}")


def test_a_classifier_of_texts_takes_no_images(runs: Runs) -> None:
    with pytest.raises(ValueError, match="the row has an image, but the model reads text only"):
        letters(runs).train("data.dataset={name: labelled, path: null, task: {name: shapes, size: 16}}")


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_run_resumed_at_every_step_changes_nothing(
    kind: str, runs: Runs, interrupt_at: Callable[[int], None], tmp_path: Path
) -> None:
    letters(runs) if kind == "texts" else pictures(runs, tmp_path / "vit")
    options = ("batch.minibatches_per_step=2", "checkpoint.every=0", "objective.label_smoothing=0.1")
    expected = runs.train(*options)
    stopped = None
    for step in (1, 2, 3):
        interrupt_at(step)
        stopped = runs.train(*options, resume=stopped)
    assert stopped is not None
    assert_equal_runs(stopped, expected, 3)
    assert saved(expected, 3)["weights"] != saved(stopped, 2)["weights"]
    head = {"texts": "score.weight", "images": "classifier.weight"}[kind]
    assert head in disk_shapes(expected / "checkpoints" / "step-000003" / "model")


def test_an_exported_classifier_goes_on_where_it_ended(runs: Runs) -> None:
    """Training goes on with the exported head, and the same folder also serves for random weights."""
    once = ("steps=1", "optimizer.warmup_steps=0")
    run = letters(runs).train(*once)
    exported = run / "checkpoints" / "step-000001" / "model"
    again = runs.train(*once, f"model.path={exported}", "optimizer.lr=1e-9", "eval.at_start=true")
    first, second = rows(run)[-1], rows(again)[0]
    assert second["step"] == 0 and second["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-6)
    fresh = runs.train(*once, f"model.path={exported}", "model.init=random", "eval.at_start=true")
    assert rows(fresh)[0]["eval/loss"] != pytest.approx(first["eval/loss"], rel=1e-3)


CLASSIFY = Classify(LABELS, label_smoothing=0.1)


def texts_with_labels(seed: int, groups: int) -> list[list[SequenceGroup]]:
    """A weighed minibatch of random texts, and one of a single text."""
    generator = random.Random(seed)

    def text() -> SequenceGroup:
        ids = generator.choices(range(256), k=generator.randrange(1, 12))
        return SequenceGroup([], [[*ids, generator.randrange(3)]], mask=[[False] * len(ids) + [True]])

    return [CLASSIFY.assign_token_weights([text() for _ in range(count)]) for count in (groups, 1)]


def images_with_labels(seed: int, groups: int) -> list[list[SequenceGroup]]:
    """Minibatches of random images with labels, for the tiny Vision Transformer."""
    generator = torch.Generator().manual_seed(seed)
    shape = ViTConfig.tiny().image_format

    def image() -> SequenceGroup:
        pixels = torch.randn(1, shape.channels, shape.height, shape.width, generator=generator)
        label = int(torch.randint(3, (), generator=generator))
        return SequenceGroup([shape.token_id] * shape.tokens, [[label]], images=pixels)

    return [CLASSIFY.assign_token_weights([image() for _ in range(count)]) for count in (groups, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "draw"),
    [("Qwen2ForCausalLM", texts_with_labels), ("ViTForImageClassification", images_with_labels)],
)
def test_two_processes_are_one(
    architecture: str, draw: Callable[..., list[list[SequenceGroup]]], tmp_path: Path
) -> None:
    """All parameters are divided between the processes, and the second minibatch leaves one process without work."""
    setup = make_setup(tiny_folder(tmp_path, architecture), objective=CLASSIFY, tokens_per_microbatch=25)
    case = Case([], 1, 0, draw=draw)
    learner = Learner(setup)
    expected, expected_weights = run_steps(learner, case, 0), whole_weights(learner)
    learner.close()
    shared = replace(setup, learner=LearnerConfig(processes=2, zero_stage=3, timeout_s=60))
    ranks = run_group(replace(case, setups=[shared], world_size=2, port=free_port("127.0.0.1")))
    ((weights, metrics, _),) = ranks[0]
    for name in ("train/loss", "train/accuracy", "train/sequences", "learner/grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=next_token"], "gives each sequence a label, but the objective has no labels"),
        (
            ["data.dataset={name: sft, task: {name: arithmetic}}", "data.chat_template=none"],
            "a classifier needs one target, .* use a data set of labels",
        ),
        (["objective.labels=[vowel, consonant]"], "unknown label 'other': expected one of vowel, consonant"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_start(
    overrides: list[str], message: str, runs: Runs, tmp_path: Path
) -> None:
    letters(runs)
    if overrides == ["objective.name=next_token"]:
        runs.values["objective"], overrides = {"name": "next_token"}, []
    with pytest.raises(ValueError, match=message):
        runs.train(*overrides)
    assert not (tmp_path / "runs").exists()


def test_no_engine_takes_a_classifier(runs: Runs) -> None:
    exported = letters(runs).train("steps=2") / "checkpoints" / "step-000002" / "model"
    for name in ("native", "vllm"):
        with pytest.raises(
            ValueError, match="a LlamaForSequenceClassification, which scores its input and cannot generate text"
        ):
            check_engine(name, engine_config(name)(), exported, EngineSetup(context_tokens=32))
