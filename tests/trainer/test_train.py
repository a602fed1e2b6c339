"""Whole runs in one process: the files that they leave, and how these files are used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.checkpoint.load_save import load_model
from tests.trainer.conftest import Runs, rows, saved
from trainer import inference
from trainer.config.load import load_config
from trainer.loop import train
from trainer.run import trained
from trainer.sources.replay import load_rollouts, replay_steps


def test_a_run_trains_and_leaves_what_it_should(runs: Runs) -> None:
    folder = runs.train("eval.at_start=true", "eval.every=1", "tracking.trackers=[tensorboard]", "steps=6")
    logged = rows(folder)
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5, 6]
    assert [row.get("rollout/weight_version") for row in logged] == [None, 1, 2, 3, 4, 5, 6]
    assert logged[-1]["eval/reward"] > logged[0]["eval/reward"] + 0.2, "it learns"
    full = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"reward/mean", "eval/accuracy", "policy/logp_gap", "time/step_s", "rollout/tokens_per_s"}
    assert wanted <= full.keys()
    assert load_config(folder / "config.yaml").name == "tiny"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {row["weight_version"] for row in completions if row["step"] == 4} == {3}
    assert (runs.folder / "runs" / "latest").resolve() == folder


def test_the_saved_configuration_is_enough_to_run_again(runs: Runs) -> None:
    first = runs.train()
    second = train(load_config(first / "config.yaml"))
    assert second != first
    assert rows(second) == rows(first) and saved(second, 3) == saved(first, 3)


def test_replayed_rollouts_give_the_same_weights_without_an_engine(runs: Runs) -> None:
    run = runs.train("rollout.save=true", "batch.epochs_per_step=2")
    assert replay_steps(run / "rollouts") == [1, 2, 3]
    replayed = runs.train("batch.epochs_per_step=2", "name=replayed", replay=run / "rollouts")
    assert saved(replayed, 3) == saved(run, 3)
    assert [row["reward/mean"] for row in rows(replayed)] == [row["reward/mean"] for row in rows(run)]
    with pytest.raises(ValueError, match="no rollouts of step 4, but the run has 5 steps"):
        runs.train("steps=5", replay=run / "rollouts")


def test_the_trained_model_leaves_the_run_and_is_sampled_from(runs: Runs, tmp_path: Path) -> None:
    run = runs.train("checkpoint.best_metric=eval/reward")
    out = trained.export(str(run), tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        trained.export(str(run), tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(out)("What is 12 + 7?")["input_ids"]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
        batch = collate([SequenceGroup([tokens[0]], [tokens[1:]], {})])
        ours = load_model(out, torch.float32)(batch).logprobs
    expected = theirs[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    config = runs.config(f"model.path={trained.trained_model(str(run))}", "eval.samples_per_prompt=2")
    metrics, groups = inference.evaluate(config)
    assert metrics["eval/accuracy"] == rows(run)[-1]["eval/accuracy"], "greedy: both samples are what the run had seen"
    assert len(groups) == 4 and "eval/pass_at_2" in metrics
    assert [step for step, _ in inference.generate_rollouts(config, 2, tmp_path / "rollouts")] == [1, 2]
    assert len(load_rollouts(tmp_path / "rollouts", 2)) == 4
    assert [len(answers) for answers in inference.answer_prompts(config, ["1 + 1 =", "2 + 2 ="], 3)] == [3, 3]
    best = trained.trained_model(str(run), "best")
    assert load_file(best / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()
