"""Dynamic sampling in whole runs: full batches of groups that teach something, exactly repeatable, and its limits."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from llmquest_rl.types import Group
from tests.trainer.conftest import REWARDS, Runs, assert_equal_runs, rows, saved
from tests.trainer.test_resume import resumed_at_every_step
from trainer.run.metric_table import METRICS
from trainer.sources.dynamic_sampling import NothingUsableError
from trainer.sources.replay import load_rollouts

ON = ("algorithm.dynamic_sampling=true", "eval.every=0", "rollout.save=true")
KEPT = ("rollout/rounds", "rollout/sampled_groups", "rollout/usable_group_share", "rollout/surplus_groups")


@pytest.fixture
def pairs(runs: Runs) -> Runs:
    """Groups of two with rewards of 0 and 1, about half of which agree."""
    runs.values["rewards"] = [{"function": f"{REWARDS}:low_first"}]
    runs.values["batch"]["samples_per_prompt"] = 2
    runs.values["optimizer"] = {"lr": 1.0e-3}
    return runs


def values(group: Group) -> set[float | None]:
    return {score.value for score in group.scores}


def position(run: Path, step: int) -> int:
    """Prompts drawn until the end of a step, as its checkpoint has it."""
    state = json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
    return int(state["source"]["stream"]["position"])


def test_every_step_is_full_of_groups_that_differ(pairs: Runs) -> None:
    run = pairs.train(*ON, "steps=6", "checkpoint.keep_last=6", "batch.max_rounds=50")
    logged = rows(run)
    for row in logged:
        groups = load_rollouts(run / "rollouts", row["step"])
        assert [values(group) for group in groups] == [{0.0, 1.0}] * 4
        assert {completion.weight_version for group in groups for completion in group.completions} == {row["step"] - 1}
        assert row["reward/zero_std_group_share"] == row["rollout/missing_groups"] == 0
        assert row["reward/scored_samples"] == 8 and row["reward/mean"] == 0.5
        usable = row["rollout/sampled_groups"] * row["rollout/usable_group_share"]
        assert usable == pytest.approx(4 + row["rollout/surplus_groups"])
        assert 0 < row["reward/sampled_mean"] < 1
        assert row["rollout/tokens"] > sum(len(c.token_ids) for group in groups for c in group.completions)
    assert max(row["rollout/rounds"] for row in logged) > 1
    drawn = [position(run, step) for step in range(1, 7)]
    assert [b - a for a, b in zip([0, *drawn], drawn, strict=False)] == [r["rollout/sampled_groups"] for r in logged]
    assert {*KEPT, "rollout/missing_groups", "reward/sampled_mean"} <= set(METRICS)


def test_without_oversampling_nothing_is_dropped(pairs: Runs) -> None:
    run = pairs.train(*ON, "batch.oversampling=1", "batch.max_rounds=50")
    assert [row["rollout/surplus_groups"] for row in rows(run)] == [0, 0, 0]


def test_where_every_group_is_usable_it_changes_nothing(runs: Runs) -> None:
    plain = runs.train("eval.every=0", "name=plain")
    dynamic = runs.train(*ON, "batch.oversampling=1")
    assert [row["rollout/sampled_groups"] for row in rows(dynamic)] == [4, 4, 4]
    assert saved(dynamic, 3) == saved(plain, 3)


def test_resumed_at_every_step_it_changes_nothing(pairs: Runs, interrupt_at: Callable[[int], None]) -> None:
    options = (*ON, "batch.minibatches_per_step=2", "batch.max_rounds=50", "checkpoint.every=0", "eval.every=3")
    expected = pairs.train(*options)
    assert max(row["rollout/rounds"] for row in rows(expected)) > 1
    assert_equal_runs(resumed_at_every_step(pairs, interrupt_at, *options), expected, 3)


def test_replayed_it_gives_the_same_weights(pairs: Runs) -> None:
    run = pairs.train(*ON)
    replayed = pairs.train(*ON, "name=replayed", replay=run / "rollouts")
    assert saved(replayed, 3) == saved(run, 3)
    assert [row["reward/mean"] for row in rows(replayed)] == [row["reward/mean"] for row in rows(run)]


def test_a_prompt_that_comes_again_in_a_later_round_is_answered_anew(pairs: Runs) -> None:
    """There are fewer training prompts than a step needs, so prompts repeat, each time with another seed."""
    path = pairs.folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": "1"}) + "\n" for i in range(10)))
    pairs.values["data"]["task"] = {"name": "table", "path": str(path), "held_out_share": 0.4}
    run = pairs.train(*ON, "steps=1", "batch.prompts_per_step=12", "batch.max_rounds=50")
    assert rows(run)[0]["rollout/rounds"] > 1
    answers = defaultdict(list)
    for group in load_rollouts(run / "rollouts", 1):
        answers[group.problem.id].append([completion.token_ids for completion in group.completions])
    assert max(map(len, answers.values())) > 1
    assert all(group not in groups[:i] for groups in answers.values() for i, group in enumerate(groups))


def test_at_the_cap_a_step_makes_do_with_what_it_has(pairs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        run = pairs.train(*ON, "batch.oversampling=1", "batch.max_rounds=1", "batch.minibatches_per_step=2")
    logged = rows(run)
    missing = [int(row["rollout/missing_groups"]) for row in logged]
    assert max(missing) > 0
    assert [len(load_rollouts(run / "rollouts", row["step"])) for row in logged] == [4 - count for count in missing]
    assert caplog.text.count("raise batch.max_rounds") == sum(count > 0 for count in missing)
    assert f"this step has {max(missing)} groups fewer" in caplog.text
    assert rows(pairs.train("name=replayed", *ON, replay=run / "rollouts"))[-1]["step"] == 3


def test_nothing_usable_stops_the_run_with_rewards_and_completions(runs: Runs) -> None:
    runs.values["rewards"] = [{"function": f"{REWARDS}:constant"}]
    message = (
        r"nothing to learn from in 12 groups of 2 rounds. Rewards: 48 x 0.5; 0 of 48 completions have no score"
        r"(.|\n)*reward 0.5, 8 tokens, ended by length\n  prompt ends: '.*='\n  completion ends: '.*'\n  answer: '.*'"
    )
    with pytest.raises(NothingUsableError, match=message):
        runs.train(*ON, "batch.max_rounds=2")
    assert len(load_rollouts(runs.newest() / "rollouts", 1)) == 12


def test_a_broken_reward_is_named_and_not_asked_again(runs: Runs) -> None:
    runs.values["rewards"] = [{"function": f"{REWARDS}:always_fails"}]
    with pytest.raises(RuntimeError, match=r"100% of 24 completions(.|\n)*this grader is broken"):
        runs.train(*ON)
