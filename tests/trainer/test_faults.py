"""Bad input and bad numbers in a run: a clear error or a counted loss, never a hang or a silent zero."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from llmquest_rl.data.rows import DataError
from rewards.failures import TooManyUnscoredError
from tests.trainer.conftest import REWARDS, Runs, rows, saved
from trainer.cli.dry_run import dry_run
from trainer.learner.state import TooManySkippedUpdatesError
from trainer.sources.replay import load_rollouts
from trainer.training_run import WeightsDifferError


def reward(runs: Runs, name: str) -> None:
    runs.values["rewards"] = [{"function": f"{REWARDS}:{name}"}]


def problems(runs: Runs, questions: list[str]) -> None:
    """A task of given rows."""
    path = runs.folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in questions))
    runs.values["data"]["task"] = {"name": "table", "path": str(path)}


def test_a_truncated_model_is_found_before_anything_starts(runs: Runs, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "truncated")
    os.truncate(folder / "model.safetensors", 10_000)
    runs.values["model"]["path"] = str(folder)
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        list(dry_run(runs.config()))


def test_a_reward_that_fails_stops_the_run_with_examples(runs: Runs) -> None:
    reward(runs, "always_fails")
    message = r"100% of 16 completions .*\(16 x exception\)(.|\n)*this grader is broken(.|\n)*completion ends"
    with pytest.raises(TooManyUnscoredError, match=message):
        runs.train()


def test_failures_below_the_limit_are_counted_and_left_out(runs: Runs) -> None:
    reward(runs, "fails_on_some")
    run = runs.train("graders.max_unscored_share=0.9", "eval.every=0")
    failed = [row["reward/failed_exception"] for row in rows(run) if "reward/failed_exception" in row]
    assert failed and sum(failed) > 0
    for row in rows(run):
        assert row["reward/scored_samples"] == 16 - row.get("reward/failed_exception", 0)
        assert row["reward/mean"] >= 1, "a failure is not a reward of 0"


def test_steps_without_a_difference_in_reward_are_skipped_and_counted(
    runs: Runs, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    reward(runs, "constant")
    run = runs.train("batch.max_zero_advantage_steps=2", "optimizer.warmup_steps=0")
    assert [row["reward/zero_advantage_steps"] for row in rows(run)] == [1, 2, 3]
    assert saved(run, 2)["weights"] == saved(run, 3)["weights"]
    assert caplog.text.count("all rewards are equal within every group") == 3
    assert "2 steps in a row without any difference in reward" in capsys.readouterr().err
    assert [row["learner/updates"] for row in rows(run)] == [0, 0, 0]


def test_steps_without_a_difference_in_reward_can_be_taken(runs: Runs) -> None:
    reward(runs, "constant")
    run = runs.train("batch.zero_advantage_groups=take", "algorithm.beta=0.1")
    assert [row["learner/updates"] for row in rows(run)] == [1, 2, 3]
    assert [row["reward/zero_advantage_steps"] for row in rows(run)] == [1, 2, 3]
    assert saved(run, 2)["weights"] != saved(run, 3)["weights"], "weight decay and the KL term move the weights"


def test_with_a_kl_steps_without_a_difference_in_reward_are_updates(runs: Runs) -> None:
    """Groups of equal rewards have no advantages, but the KL counts, even if a step has no other groups."""
    reward(runs, "constant")
    run = runs.train("algorithm.beta=0.1")
    assert [row["learner/updates"] for row in rows(run)] == [1, 2, 3]
    assert [row["reward/zero_advantage_steps"] for row in rows(run)] == [1, 2, 3]


def test_bad_numbers_are_skipped_counted_and_end_the_run(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    reward(runs, "huge")
    with pytest.raises(
        TooManySkippedUpdatesError, match=r"2 updates in a row had NaN or inf .* The last batch is in"
    ) as error:
        runs.train("learner.max_skipped_updates=1", "algorithm.advantage=group_mean", "checkpoint.every=1")
    run = runs.newest()
    assert [row["learner/skipped_updates"] for row in rows(run)] == [1]
    assert "update 1 had NaN or inf" in caplog.text
    [batch] = list(run.glob("skipped_update*.pt"))
    assert str(batch) in str(error.value)
    assert all(sequence_group.completions for sequence_group in torch.load(batch, weights_only=False))


def test_empty_completions_train_and_are_counted(runs: Runs) -> None:
    """A stop string that comes first leaves an empty text; it is graded like any other."""
    run = runs.train("rollout.sampling.stop=[a, b, c, d, e, f, g, h]", "rollout.save=true")
    groups = [group for step in (1, 2, 3) for group in load_rollouts(run / "rollouts", step)]
    empty = [s for g in groups for c, s in zip(g.completions, g.scores, strict=True) if not c.text]
    assert empty and all(score.value == 0 for score in empty)
    assert all(row["reward/scored_samples"] == 16 for row in rows(run))


def test_prompts_that_are_too_long_are_dropped_and_counted(runs: Runs) -> None:
    problems(runs, [f"{i}?" for i in range(30)] + ["x" * 200 + str(i) for i in range(10)])
    run = runs.train("steps=8", "eval.every=0")
    assert rows(run)[-1]["data/dropped_long_prompts"] > 0
    with pytest.raises(DataError, match="more than data.max_prompt_tokens = 128"):
        runs.train("steps=8", "data.long_prompts=error")


def test_prompts_that_are_all_too_long_are_an_error_before_the_start(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise data.max_prompt_tokens"):
        runs.train("data.max_prompt_tokens=4")
    assert not (tmp_path / "runs").exists()


def test_a_context_that_the_model_does_not_have_is_an_error_before_the_start(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower data.max_prompt_tokens, or max_tokens in"):
        runs.train("rollout.sampling.max_tokens=100000", "batch.tokens_per_microbatch=1000000")
    assert not (tmp_path / "runs").exists()


def test_an_engine_with_other_weights_ends_the_run(runs: Runs) -> None:
    """bfloat16 against float32 differs by more than this limit."""
    with pytest.raises(WeightsDifferError, match=r"policy/logp_gap is .*, but rollout.max_logprob_gap is 1e-06"):
        runs.train("rollout.dtype=bfloat16", "rollout.max_logprob_gap=1e-6")


def test_a_replay_of_nothing_is_an_error_before_the_start(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rollouts of step 1"):
        runs.train(replay=runs.folder)
    assert not (tmp_path / "runs").exists()
