"""The best checkpoint by reward - beta KL, with a limit of the KL; and the KL of sample completions."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmquest_rl.algorithms.sequence_groups import repetition
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.checkpoint.load_save import load_model
from tests.trainer.conftest import Runs, rows
from trainer.config.tree import ConfigError
from trainer.run.checkpoint import Best, best_checkpoint
from trainer.run.selection import best_score
from trainer.sources.replay import load_rollouts

REWARD, KL = "eval/reward", "policy/kl_sequence"


@pytest.mark.parametrize(
    ("metrics", "mode", "kl_coef", "max_kl", "expected"),
    [
        ({REWARD: 2.0, KL: 10.0}, "max", 0.1, None, Best(f"{REWARD} - 0.1 KL", 1.0, "max")),
        ({REWARD: 2.0, KL: 10.0}, "min", 0.1, None, Best(f"{REWARD} + 0.1 KL", 3.0, "min")),
        ({REWARD: 2.0, KL: 10.0}, "max", 0.0, None, Best(REWARD, 2.0, "max")),
        ({REWARD: 2.0}, "max", 0.0, None, Best(REWARD, 2.0, "max")),
        ({REWARD: 2.0, KL: 10.0}, "max", 0.0, 9.0, None),
        ({REWARD: 2.0, KL: 10.0}, "max", 0.0, 10.0, Best(f"{REWARD} - 0 KL", 2.0, "max")),
        ({REWARD: 2.0, "train/kl": 5.0}, "max", 0.1, 9.0, Best(f"{REWARD} - 0.1 KL", 1.5, "max")),
        ({REWARD: 2.0, KL: math.nan}, "max", 0.1, None, None),
        ({REWARD: 2.0}, "max", 0.1, None, None),
        ({KL: 1.0}, "max", 0.1, None, None),
    ],
)
def test_the_score_of_a_checkpoint(
    metrics: dict[str, float], mode: str, kl_coef: float, max_kl: float | None, expected: Best | None
) -> None:
    assert best_score(metrics, REWARD, mode, kl_coef, max_kl) == expected  # type: ignore[arg-type]
    assert best_score(metrics, None, mode, kl_coef, max_kl) is None  # type: ignore[arg-type]


def test_a_run_keeps_the_checkpoint_with_the_best_reward_minus_kl(runs: Runs) -> None:
    """With a large coefficient the first one is the best, as its KL is 0; a limit leaves out those beyond it."""
    options = ("algorithm.beta=0.001", "steps=3", "eval.every=1", "checkpoint.every=1", "checkpoint.keep_last=1")
    chosen = "checkpoint.best_metric=eval/reward"
    run = runs.train(*options, chosen, "checkpoint.kl_coef=1000")
    logged = {row["step"]: row for row in rows(run)}
    for row in logged.values():
        assert row["checkpoint/score"] == pytest.approx(row["eval/reward"] - 1000 * row["policy/kl_sequence"])
    kls = [row["policy/kl_sequence"] for row in logged.values()]
    assert kls[0] < 1e-4 < kls[1] and kls[0] < kls[-1]
    best = max(logged, key=lambda step: logged[step]["checkpoint/score"])
    assert best == 1 and best_checkpoint(run / "checkpoints") == run / "checkpoints" / "step-000001"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000003"]

    limited = runs.train(*options, chosen, f"checkpoint.max_kl={kls[1] / 2}")
    assert [row["step"] for row in rows(limited) if "checkpoint/score" in row] == [1]
    assert best_checkpoint(limited / "checkpoints") == limited / "checkpoints" / "step-000001"


@pytest.mark.parametrize(
    "options", [["algorithm.beta=0"], ["objective={name: preference, source: rollout_pairs, method: simpo}"]]
)
def test_a_limit_without_a_kl_is_refused(runs: Runs, options: list[str]) -> None:
    with pytest.raises(ConfigError, match="checkpoint.max_kl: max_kl and kl_coef need the KL"):
        runs.config(*options, "checkpoint.max_kl=1")


def test_sample_completions_show_their_kl_to_the_reference(runs: Runs, tiny_model: Path) -> None:
    """It is the log-ratio of the policy that sampled, which the engine knows, to the initial model."""
    runs.values["tracking"] |= {"completions_per_step": 5}
    run = runs.train("algorithm.beta=0.01", "rollout.save=true", "steps=3")
    found = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(found) == 15
    reference = load_model(tiny_model, torch.float32)
    for step in (1, 3):
        groups = {group.problem.id: group for group in load_rollouts(run / "rollouts", step)}
        shown = [row for row in found if row["step"] == step]
        for row in shown:
            group = groups[row["problem"]]
            [completion] = [c for c in group.completions if c.text == row["completion"]][:1]
            batch = collate([SequenceGroup(group.problem.prompt_ids, [completion.token_ids])])
            with torch.no_grad():
                expected = sum(completion.logprobs) - float(reference(batch).logprobs.sum())
            assert row["kl"] == pytest.approx(expected, abs=1e-4)
            assert row["repetition"] == repetition(completion.token_ids)
        assert (max(abs(row["kl"]) for row in shown) < 1e-4) == (step == 1)
    row = rows(run)[-1]
    assert 0 <= row["rollout/repetition"] <= 1 and row["policy/kl_sequence"] >= row["policy/kl"] > 0


def test_repetition_is_the_share_of_runs_that_occurred_before() -> None:
    assert repetition([]) == repetition([1, 1, 1]) == repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)


def test_without_a_reference_there_is_no_kl(runs: Runs) -> None:
    run = runs.train("steps=1", "optimizer.warmup_steps=0")
    assert {json.loads(line)["kl"] for line in (run / "completions.jsonl").read_text().splitlines()} == {None}
