"""Every row of the algorithm table in a whole run: it starts, it learns, and it logs its metrics."""

import math

import pytest

from llmquest_rl.algorithms.presets import PRESETS
from tests.trainer.conftest import Runs, rows
from trainer.run.metric_table import METRICS

CUT = "algorithm.overlong_filter=false"
"""The tiny model seldom ends a completion by itself: a filter of cut ones would leave little."""

SPECIAL = {
    "pass_at_k": ["algorithm.pass_k=2"],
    "fipo": ["batch.minibatches_per_step=2"],
    "flash_reinforce": ["batch.samples_per_prompt=1", "batch.prompts_per_step=16"],
    "ppo": ["objective={name: policy, critic: {lr: 0.01}}"],
}
"""Options that a row needs, or is made for."""


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_learns(name: str, runs: Runs) -> None:
    steps = 18 if name == "reinforce" else 6  # without a baseline: the variance that the others are there to lower
    options = [f"algorithm.name={name}", *SPECIAL.get(name, []), CUT, f"steps={steps}", f"eval.every={steps}"]
    logged = rows(runs.train(*options, "eval.at_start=true", "checkpoint.every=0"))
    assert logged[-1]["eval/reward"] > logged[0]["eval/reward"] + 0.1
    named = {key for row in logged for key in row if key.startswith(("policy/", "learner/"))}
    assert named <= set(METRICS)


ALL_OPTIONS = {
    "beta": 0.05,
    "entropy_bonus": 0.01,
    "top_entropy_fraction": 0.5,
    "off_policy_delta": 0.5,
    "length_penalty": "relative",
    "advantage_limit": 3.0,
    "positive_weight": 0.7,
    "is_correction": "geometric_mask",
    "tis_floor": 0.9,
    "tis_cap": 1.1,
}


@pytest.mark.parametrize("name", ["grpo", "gspo_token", "sapo", "cispo", "reinforce_pp"])
def test_all_options_together_and_several_updates(name: str, runs: Runs) -> None:
    options = [f"algorithm.{key}={value}" for key, value in ALL_OPTIONS.items()]
    sizes = ["batch.minibatches_per_step=2", "batch.epochs_per_step=2", "batch.tokens_per_microbatch=160"]
    folder = runs.train(f"algorithm.name={name}", *options, *sizes)
    for row in rows(folder):
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert 0.3 <= row["policy/low_entropy_share"] <= 0.5
        assert row["policy/kl"] >= 0.0
        assert row["learner/skipped_updates"] == 0


def test_the_reference_becomes_the_current_model_again_and_again(runs: Runs) -> None:
    """One update a step: its KL is 0 where the model has just become the reference."""
    logged = rows(runs.train("algorithm.beta=0.1", "algorithm.ref_sync_interval=2", "steps=6", "eval.every=0"))
    divergences = [row["policy/kl"] for row in logged]
    assert [divergences[step] for step in (0, 2, 4)] == [pytest.approx(0.0, abs=1e-9)] * 3
    assert min(divergences[step] for step in (1, 3, 5)) > 1e-6
    stays = [row["policy/kl"] for row in rows(runs.train("algorithm.beta=0.1", "steps=6", "eval.every=0"))]
    assert stays[1] == divergences[1] and min(stays[1:]) > 1e-6


def test_cut_completions_are_filtered(runs: Runs) -> None:
    row, *_ = rows(runs.train("algorithm.name=dapo", "steps=2", "eval.every=0", "batch.zero_advantage_groups=take"))
    ended, longest = 16 * (1 - row["rollout/truncated_share"]), 8
    assert ended >= 1
    assert row["policy/tokens"] <= ended * longest < row["reward/scored_samples"] * longest
