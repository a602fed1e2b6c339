"""Preference methods in whole runs: from pairs, from answers one by one, and from the policy's own completions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import Runs, assert_equal_runs, rows
from tests.trainer.sources.pair_cases import write_pairs
from tests.trainer.test_resume import resumed_at_every_step
from trainer.cli.dry_run import dry_run
from trainer.config.load import ConfigError
from trainer.learner.learner import Learner


def on_pairs(runs: Runs, **objective: Any) -> Runs:
    """Runs on pairs whose chosen reply has the characters before `A`."""
    runs.values["objective"] = {"name": "preference", **objective}
    path = write_pairs(runs.folder / "pairs.jsonl", 1000)
    dataset = {"name": "preferences", "path": str(path)}
    runs.values["data"] = {"dataset": dataset, "system_prompt": "Add.", "eval_size": 40}
    runs.values["batch"] = {"sequences_per_step": 16, "tokens_per_sequence": 100, "tokens_per_microbatch": 1024}
    return runs


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_it_learns_which_replies_are_preferred(method: str, runs: Runs) -> None:
    """On pairs that are held out. `kto` reads the same replies one by one, from a file of labels."""
    on_pairs(runs, method=method)
    if method == "kto":
        pairs = [json.loads(line) for line in (runs.folder / "pairs.jsonl").read_text().splitlines()]
        answers = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        path = runs.folder / "answers.jsonl"
        path.write_text("\n".join(map(json.dumps, answers)))
        runs.values["data"]["dataset"] = {"name": "unpaired_preferences", "path": str(path)}
    options = ("eval.every=30", "eval.at_start=true", "checkpoint.every=0", "batch.sequences_per_step=32")
    run = runs.train("steps=30", "optimizer.lr=1e-2", *options)
    first, last = rows(run)[0], rows(run)[-1]
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/margin"] > first["eval/margin"]
    if method == "dpo":
        assert (first["eval/margin"], first["eval/accuracy"]) == (0.0, 0.0), "at first the policy is the reference"
        assert last["eval/accuracy"] > 0.65
    if method == "kto":
        assert first["eval/kl"] == 0.0 and "eval/accuracy" not in last


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_resumed_at_every_step_changes_nothing(method: str, runs: Runs, interrupt_at: Callable[[int], None]) -> None:
    on_pairs(runs, method=method)
    options = ("batch.minibatches_per_step=2", "checkpoint.every=0")
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *options), runs.train(*options), 3)


def test_online_pairs_raise_the_reward_of_the_policys_own_answers(
    runs: Runs, interrupt_at: Callable[[int], None]
) -> None:
    """The best and the worst completion of each group are a pair; the run resumes exactly, as RL does."""
    runs.values["objective"] = {"name": "preference", "source": "rollout_pairs", "beta": 0.05}
    options = ("steps=8", "optimizer.lr=3e-3", "optimizer.schedule=constant", "batch.prompts_per_step=8")
    run = runs.train(*options, "checkpoint.every=0")
    found = rows(run)
    assert found[-1]["reward/mean"] > found[0]["reward/mean"] + 0.05
    assert found[0]["policy/logp_gap"] < 1e-4 and found[0]["train/kl"] == pytest.approx(0.0, abs=1e-5)
    assert found[-1]["train/kl"] > 0
    assert 0 < found[0]["train/pairs"] <= 8
    short = ("batch.minibatches_per_step=2", "batch.epochs_per_step=2", "checkpoint.every=0")
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *short), runs.train(*short), 3)


def test_cached_logprobs_of_the_reference_are_those_of_a_live_one(
    runs: Runs, interrupt_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is made once; a second run reads it, and so does a resumed one."""
    on_pairs(runs)
    live = rows(runs.train("batch.minibatches_per_step=2"))
    runs.values["objective"]["reference_cache"] = str(runs.folder / "cache" / "reference.safetensors")
    runs.values["batch"]["minibatches_per_step"] = 2
    run = runs.train()
    for with_file, without in zip(rows(run), live, strict=True):
        assert with_file == pytest.approx(without, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(Learner, "logprobs", None)
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, "checkpoint.every=0"), run, 3)


def test_a_cache_of_something_else_is_refused_by_name(runs: Runs, tiny_model: Path) -> None:
    on_pairs(runs)
    cache = runs.folder / "reference.safetensors"
    runs.values["objective"]["reference_cache"] = str(cache)
    runs.train("steps=2")
    with pytest.raises(ValueError, match="reference.safetensors was made with another chat template and another data"):
        runs.train("steps=2", "data.system_prompt=Subtract.")
    other = runs.folder / "other"
    shutil.copytree(tiny_model, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match="was made with another model: name another file"):
        runs.train("steps=2", f"model.path={other}")
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(ValueError, match="reference.safetensors is damaged"):
        runs.train("steps=2")


def test_groups_without_a_difference_make_no_pair_and_no_update(runs: Runs) -> None:
    runs.values["objective"] = {"name": "preference", "source": "rollout_pairs", "pair_threshold": 1e6}
    [*_, last] = rows(runs.train("steps=2"))
    assert last["reward/zero_advantage_steps"] == 2 and last["learner/updates"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.method": "dpoo"}, "no preference method is called 'dpoo'; did you mean dpo"),
        ({"objective.tau": 0.1}, "tau is read only with link: discopop"),
        ({"batch.tokens_per_microbatch": 150}, "twice tokens_per_sequence for pairs"),
        ({"objective.method": "simpo", "objective.reference_cache": "x"}, "'logprob_mean' needs no reference model"),
        ({"objective.method": "kto", "objective.reference_cache": "x"}, "answers to other prompts"),
        ({"objective.source": "rollout_pairs"}, "the objective learns from rollouts: name a task"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str, runs: Runs) -> None:
    on_pairs(runs)
    with pytest.raises(ConfigError, match=message):
        runs.config(*(f"{key}={value}" for key, value in changes.items()))


def test_a_dry_run_shows_the_pairs(runs: Runs) -> None:
    results = {result.name: result for result in dry_run(on_pairs(runs).config())}
    assert all(result.passed for result in results.values())
    prompt, chosen, rejected = results["example"].text.split("\n")
    assert "assistant" in prompt and "<|im_end|>" in chosen and "<|im_end|>" in rejected and chosen != rejected


def test_other_data_is_refused_with_the_data_set_to_use(runs: Runs, tmp_path: Path) -> None:
    on_pairs(runs)
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "a"}) for i in range(40)))
    runs.values["data"]["dataset"] = {"name": "sft", "path": str(rows_file)}
    with pytest.raises(ValueError, match="the method 'dpo' learns from pairs of a chosen and a rejected answer"):
        runs.train()
