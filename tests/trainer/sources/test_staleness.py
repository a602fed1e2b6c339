"""Weights that are synced every few steps, and ratios to the policy that sampled."""

from pathlib import Path

import pytest

from tests.trainer.conftest import REWARDS, Runs, rows
from trainer.run.tracking import JsonLines
from trainer.sources.replay import load_rollouts


def test_weights_are_synced_every_few_steps_and_staleness_says_so(runs: Runs) -> None:
    run = runs.train("rollout.weight_sync_interval=2", "steps=5", "eval.every=0", "rollout.max_logprob_gap=null")
    found = rows(run)
    assert [row["rollout/staleness"] for row in found] == [0, 1, 0, 1, 0]
    assert [row.get("rollout/weight_version") for row in found] == [None, 2, None, 4, None]


def test_ratios_to_the_engine_see_stale_weights(runs: Runs) -> None:
    """The first update of a step: ratio 1 against the learner's old policy, and away from 1 against stale weights."""
    options = (
        "rollout.weight_sync_interval=3",
        "eval.every=0",
        "rollout.max_logprob_gap=null",
        "algorithm.tis_cap=null",
    )
    learner, engine = (
        rows(runs.train(f"name={name}", f"algorithm.old_policy={name}", *options)) for name in ("learner", "engine")
    )
    assert [row["policy/ratio_max"] for row in learner] == [1.0, 1.0, 1.0]
    assert engine[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert all(row["policy/ratio_max"] > 1.01 for row in engine[1:])
    assert all(row["policy/logp_gap"] > 1e-3 for row in (*learner[1:], *engine[1:])), "the gap shows staleness"


def test_a_resumed_run_starts_with_fresh_weights(runs: Runs) -> None:
    options = ("rollout.weight_sync_interval=4", "eval.every=0", "rollout.max_logprob_gap=null")
    run = runs.train("steps=2", *options)
    resumed: Path = runs.train("steps=4", *options, resume=run)
    assert [row["rollout/staleness"] for row in JsonLines(resumed / "metrics.jsonl").read()] == [0, 1, 0, 1]


def test_groups_left_over_serve_the_next_step_while_the_weights_are_the_same(runs: Runs) -> None:
    runs.values["rewards"] = [{"function": f"{REWARDS}:low_first"}]
    runs.values["batch"]["samples_per_prompt"] = 2
    options = ("algorithm.dynamic_sampling=true", "batch.oversampling=3", "batch.max_rounds=50", "eval.every=0")
    run = runs.train(
        *options, "rollout.weight_sync_interval=2", "steps=6", "rollout.max_logprob_gap=null", "rollout.save=true"
    )
    found = rows(run)
    surplus, reused = ([row[f"rollout/{name}_groups"] for row in found] for name in ("surplus", "reused"))
    assert sum(surplus[::2]) > 0, "the first step of each pair left something over"
    assert reused[1::2] == surplus[::2] and not any(reused[::2])
    for row in found:
        groups = load_rollouts(run / "rollouts", row["step"])
        versions = {completion.weight_version for group in groups for completion in group.completions}
        assert versions == {row["step"] - 1 - row["rollout/staleness"]} and len(groups) == 4
