"""Vision-language models through the real loop: RL on pictures and captioning, with every decoder."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.models.checkpoint.assemble_vlm import assemble
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.models.vit import ViTConfig
from llmquest_rl.models.vlm import VLMConfig
from llmquest_rl.models.weight_map import named_weights
from tests.models.families import LANGUAGE_MODELS, tiny_folder
from tests.trainer.conftest import Runs, assert_equal_runs, rows, saved
from tests.trainer.learner.learner_cases import Case, make_setup, minibatches, run_group, run_steps, whole_weights
from tests.trainer.learner.test_group import assert_same
from tests.trainer.test_families import tiny_of
from trainer.cluster.worker_group import free_port
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner
from trainer.sources.replay import load_rollouts

pytestmark = pytest.mark.slow

TINY = VLMConfig.tiny()

PICTURES = (
    "data.task.name=shapes",
    "rollout.engine.name=native",
    "rollout.save=true",
    "steps=2",
)


def vlm_of(decoder: str, tokenizer: Path, folder: Path) -> Path:
    """A random model with 5 vision tokens per image; `~` of the tiny tokenizer is the image token."""
    language = tiny_of(decoder, tokenizer, folder / "language")
    vision = folder / "vision"
    vision.mkdir()
    (vision / "config.json").write_text(json.dumps(replace(ViTConfig.tiny(), initializer_range=0.1).to_hf()))
    mark = json.loads((language / "config.json").read_text())["vocab_size"] - 1
    assemble(vision, language, folder / "vlm", mark)
    return folder / "vlm"


@pytest.mark.parametrize("decoder", LANGUAGE_MODELS)
def test_two_grpo_steps_with_images(decoder: str, tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    folder = vlm_of(decoder, tiny_model, tmp_path / "family")
    run = runs.train(f"model.path={folder}", "model.gradient_checkpointing=true", *PICTURES)
    logged = rows(run)
    assert [row["rollout/weight_version"] for row in logged] == [1, 2]
    assert all(row["policy/logp_gap"] < 1e-4 for row in logged), "the engine computes what the learner computes"
    groups = load_rollouts(run / "rollouts", 2)
    assert all(group.problem.images is not None and len(group.problem.images) == 1 for group in groups)
    before = dict(named_weights(load_model(folder, torch.float32)))
    after = dict(named_weights(load_model(run / "checkpoints" / "step-000002" / "model", torch.float32)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"vision.patches.weight", "vision.blocks.0.attention.query.weight", "adapter.up.weight"} <= changed


def test_rollouts_with_images_are_replayed_bit_for_bit(tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    folder = vlm_of("LlamaForCausalLM", tiny_model, tmp_path / "family")
    options = (f"model.path={folder}", *PICTURES)
    run = runs.train(*options)
    replayed = runs.train(*options, "name=replayed", "rollout.save=false", replay=run / "rollouts")
    assert saved(replayed, 2) == saved(run, 2)
    completions = (run / "completions.jsonl").read_text()
    assert "How many" in completions and "array" not in completions


def test_a_run_with_images_resumes_bit_for_bit(
    tiny_model: Path, runs: Runs, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    folder = vlm_of("LlamaForCausalLM", tiny_model, tmp_path / "family")
    options = (f"model.path={folder}", *PICTURES)
    expected = runs.train(*options)
    interrupt_at(1)
    stopped = runs.train(*options)
    assert len(rows(stopped)) == 1
    assert_equal_runs(runs.train(*options, resume=stopped), expected, 2)


def test_captions_are_learnt(tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    """The caption is the colour of the shape. Without the picture, the loss is at least the entropy of the colour,
    divided by the tokens of its name."""
    folder = vlm_of("LlamaForCausalLM", tiny_model, tmp_path / "family")
    task = {"name": "shapes", "ask": "colour", "size": 16, "template": "{question}="}
    runs.values["objective"] = {"name": "next_token"}
    runs.values["data"] = {"dataset": {"name": "sft", "task": task}, "eval_size": 16}
    runs.values["batch"] |= {"sequences_per_step": 16, "tokens_per_sequence": 256, "tokens_per_microbatch": 2048}
    runs.values["optimizer"] = {"lr": 3e-3}
    run = runs.train(f"model.path={folder}", "steps=30", "eval.every=30", "eval.at_start=true")
    losses = [row["eval/loss"] for row in rows(run) if "eval/loss" in row]
    blind = math.log(4) / mean(len(colour) + 1 for colour in ("red", "green", "blue", "yellow"))
    assert losses[-1] < 0.75 * blind < 0.05 * losses[0]


def mixed(seed: int, groups: int) -> list[list[SequenceGroup]]:
    """Minibatches of 1, of 2 and of `groups` groups; every other one, the first to begin with, has an image."""
    pixels = torch.Generator().manual_seed(seed)

    def seen(sequence_group: SequenceGroup, number: int) -> SequenceGroup:
        text = [min(token, TINY.image_token_id - 1) for token in sequence_group.prompt]
        if number % 2:
            return replace(sequence_group, prompt=text)
        mark = [TINY.image_token_id] * TINY.image_format.tokens
        return replace(sequence_group, prompt=mark + text, images=torch.randn(1, 3, 16, 16, generator=pixels))

    drawn = [minibatches(seed, count=1, groups=count)[0] for count in (1, 2, groups)]
    return [[seen(sequence_group, i) for i, sequence_group in enumerate(sequence_groups)] for sequence_groups in drawn]


def test_processes_with_and_without_images_are_one(tmp_path: Path) -> None:
    """With one group the second process has no work, with two only text; with five, both have images and text."""
    folder = tiny_folder(tmp_path / "model", "VisionLanguageForCausalLM")
    setup = make_setup(folder, tokens_per_microbatch=60)
    learners = [LearnerConfig.model_validate({"processes": 2, "zero_stage": n, "timeout_s": 60}) for n in (0, 2, 3)]
    setups = [replace(setup, learner=learner) for learner in learners]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), draw=mixed))
    alone = Learner(make_setup(folder))
    metrics = run_steps(alone, Case([], 1, 0, draw=mixed), 0)
    weights = {name: tensor for name, tensor in whole_weights(alone).items() if not name.endswith("key.bias")}
    alone.close()
    for result in ranks[0]:  # a key's bias has no gradient but rounding
        assert_same(result, (weights, metrics))
