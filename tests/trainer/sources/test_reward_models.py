"""Reward models: trained from pairs, exported, and judging rollouts that a policy is trained on."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import preferences
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.stream import SequenceGroupStream
from llmquest_rl.models.checkpoint.load_classifier import load_classifier
from llmquest_rl.models.checkpoint.load_save import save_model
from llmquest_rl.models.checkpoint.parity import parity
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives.reward_model import BIN_STARTS
from llmquest_rl.types import Completion, Problem, Score
from rewards.failures import TooManyUnscoredError
from rewards.grader import combine_scores
from rewards.types import GradeItem
from tests.trainer.conftest import REWARDS, Runs, assert_equal_runs, rows
from tests.trainer.sources.pair_cases import write_pairs
from tests.trainer.test_resume import resumed_at_every_step
from trainer import inference
from trainer.cli.calibration import calibration, reliability
from trainer.cli.dry_run import dry_run
from trainer.cluster.worker_group import InlineWorkerGroup
from trainer.config.reward_model import RewardModelConfig
from trainer.config.tree import ConfigError
from trainer.learner.microbatches import split_to_budget
from trainer.run import trained
from trainer.sources.reward_model_worker import RewardModelSetup, RewardModelWorker
from trainer.sources.rollouts import RewardWorkers, Rollouts

REWARD_MODEL = {"name": "scorer", "system_prompt": "Add.", "dtype": "float32"}
ITEMS = [
    GradeItem("12 + 34=", "46", None),
    GradeItem("12 + 34=", "zzz", None),
    GradeItem("12 + 34=", "", None),
    GradeItem([{"role": "user", "content": "Hello"}], "123 abc", None),
    GradeItem("7 + 8=", "*" * 20, None),
]


@pytest.fixture(scope="session")
def model(reward_model_run: Path) -> Path:
    """The trained reward model's folder."""
    return trained.trained_model(str(reward_model_run))


def worker(path: Path, **changes: Any) -> RewardModelWorker:
    config = RewardModelConfig.model_validate(REWARD_MODEL | {"path": str(path)} | changes)
    return RewardModelWorker(RewardModelSetup(config, path))


def scored_by(runs: Runs, path: Path, **changes: Any) -> None:
    """The run has one reward model and no reward."""
    runs.values["rewards"] = []
    runs.values["reward_models"] = [REWARD_MODEL | {"path": str(path)} | changes]


def with_head(model: Path, folder: Path, value: float) -> Path:
    """A copy whose head has this weight everywhere."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_learns_which_reply_was_chosen(reward_model_run: Path) -> None:
    first, *_, last = rows(reward_model_run)
    assert last["eval/accuracy"] >= 0.9 > 0.7 > first["eval/accuracy"], "of pairs that it was not trained on"
    assert last["eval/loss"] < 0.4 < first["eval/loss"]
    assert abs(last["eval/reward_mean"]) < 0.5 * last["eval/reward_std"], "scores are around 0, as `center` asks"
    assert last["eval/pairs"] == 100


def test_the_worker_gives_the_scores_that_the_learner_gave(reward_model_run: Path, model: Path) -> None:
    """The worker scores the texts of the learner's validation pairs; the learner's metrics hold the expected values."""
    judging = worker(model)
    pairs = [json.loads(line) for line in (reward_model_run.parents[2] / "pairs.jsonl").read_text().splitlines()]
    context = DatasetContext(judging.renderer, 100, 0, MalformedRows("error"), labels=("reward",))
    data = preferences.load(preferences.Config(path=str(reward_model_run.parents[2] / "pairs.jsonl")), context)
    held_out = {
        tuple(sequence_group.prompt + ids[:-1])
        for sequence_group in data.validation
        for ids in sequence_group.completions
    }
    items = [GradeItem(pair["prompt"], pair[reply], None) for pair in pairs for reply in ("chosen", "rejected")]
    read = [tuple(sum(judging.token_ids(item), [])) for item in items]
    assert held_out <= set(read), "a rollout is judged by the tokens of a training pair"

    last = rows(reward_model_run)[-1]
    scored = dict(zip(read, [score.value for score in judging.grade(items)], strict=True))
    validated = SequenceGroupStream(data, 0).validation(100)
    chosen, rejected = (
        torch.tensor(
            [scored[tuple(sequence_group.prompt + sequence_group.completions[i][:-1])] for sequence_group in validated]
        )
        for i in (0, 1)
    )
    assert float((chosen - rejected).mean()) == pytest.approx(last["eval/margin"], abs=1e-5)
    assert float((chosen > rejected).float().mean()) == pytest.approx(last["eval/accuracy"])
    assert float(torch.cat([chosen, rejected]).mean()) == pytest.approx(last["eval/reward_mean"], abs=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [8192, 60, 1])
def test_scores_are_those_of_transformers_however_they_are_batched(model: Path, tokens_per_batch: int) -> None:
    judging = worker(model, tokens_per_batch=tokens_per_batch, weight=0.5)
    theirs = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    started = time.perf_counter()
    scores = judging.grade([*ITEMS, ITEMS[1]])
    assert 0 < sum(score.seconds for score in scores) < time.perf_counter() - started, "each has its share of the time"
    with torch.no_grad():
        expected = [float(theirs(torch.tensor([sum(judging.token_ids(item), [])])).logits) for item in ITEMS]
    assert [score.parts["scorer"] for score in scores] == pytest.approx([*expected, expected[1]], abs=1e-5)
    assert [score.value for score in scores] == pytest.approx([0.5 * score.parts["scorer"] for score in scores])  # type: ignore[operator]
    assert judging.grade([]) == []


def test_system_prompt_and_template_are_those_of_its_training(model: Path) -> None:
    plain, prompted = worker(model, system_prompt=None, chat_template="none"), worker(model)
    texts = [judging.renderer.decode(sum(judging.token_ids(ITEMS[0]), [])) for judging in (plain, prompted)]
    assert texts[0] == "12 + 34=46<|im_end|>"
    assert texts[1].startswith("<|im_start|>system\nAdd.<|im_end|>") and texts[1].endswith("46<|im_end|>")
    [refused] = plain.grade([ITEMS[3]])
    assert refused.failure == "invalid" and "need a chat template" in refused.detail


def test_what_cannot_be_judged_is_a_failure_and_its_neighbours_are_not(model: Path, tmp_path: Path) -> None:
    scores = worker(model, max_tokens=60).grade([ITEMS[0], GradeItem("12 + 34=", "4" * 60, None), ITEMS[1]])
    assert [score.failure for score in scores] == [None, "invalid", None]
    assert scores[1].value is None and scores[1].parts == {}
    assert "the reward model reads 60 at most" in scores[1].detail
    plain = worker(model).grade([ITEMS[0], ITEMS[1]])
    assert [scores[0].value, scores[2].value] == pytest.approx([score.value for score in plain], abs=1e-5)
    broken = worker(with_head(model, tmp_path / "nan", float("nan"))).grade(ITEMS[:2])
    assert [score.failure for score in broken] == ["invalid", "invalid"]
    assert "the reward model `scorer`: the score is nan" in broken[0].detail


def test_a_judge_that_answers_nan_ends_the_run_and_is_named(runs: Runs, model: Path, tmp_path: Path) -> None:
    scored_by(runs, with_head(model, tmp_path / "nan", float("nan")))
    with pytest.raises(
        TooManyUnscoredError, match=r"100% of 16 completions (.|\n)*reward model `scorer`: the score is nan"
    ):
        runs.train()
    runs.values["rewards"] = [{"function": f"{REWARDS}:low_characters"}]
    runs.values["graders"] |= {"max_unscored_share": 1.0}
    row = rows(runs.train("steps=1", "optimizer.warmup_steps=0", "eval.every=0"))[-1]
    assert row["reward/failed_invalid"] == row["reward/unscored_share"] * 16 == 16
    assert "reward/mean" not in row, "and it is nowhere a number"


def test_a_total_that_is_not_finite_is_a_failure() -> None:
    large = Score(1e308, {"a": 1e308})
    failed = combine_scores([large, large])
    assert (failed.value, failed.failure) == (None, "invalid") and "the total reward is inf" in failed.detail
    assert combine_scores([Score(float("nan"), {"a": 1.0})]).failure == "invalid"


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_another_pooling_is_trained_exported_and_honoured(
    runs: Runs, tmp_path: Path, pooling: str, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = write_pairs(runs.folder / "pairs.jsonl", 300)
    runs.values["data"] = {"dataset": {"name": "preferences", "path": str(pairs)}, "system_prompt": "Add."}
    runs.values["batch"] |= {"sequences_per_step": 16, "tokens_per_sequence": 100}
    options = (f"objective={{name: reward_model, pooling: {pooling}}}", "eval.every=3", "data.eval_size=100")
    run = runs.train(*options)
    out = trained.export(str(run), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["score_pooling"] == pooling
    assert ("mean over the tokens" in caplog.text) == (pooling == "mean")
    judging = worker(out)
    scores = judging.grade(ITEMS)
    theirs = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    for item, found in zip(ITEMS, scores, strict=True):
        before, reply = judging.token_ids(item)
        ids = before + reply
        assert (ids[-1] == judging.renderer.tokenizer.eos_token_id) == (pooling == "mean")
        read = range(len(before), len(ids)) if pooling == "mean" else [len(ids) - 1]
        with torch.no_grad():
            at_each = [float(theirs(torch.tensor([ids[: i + 1]])).logits) for i in read]
        assert found.value == pytest.approx(sum(at_each) / len(at_each), abs=1e-5)
    if pooling == "mean":
        with pytest.raises(ValueError, match="score_pooling 'mean'.*transformers ignores"):
            parity(out)
    else:
        assert parity(out).worst < 1e-5
    last = rows(run)[-1]
    assert 0 <= last["eval/accuracy_low"] < last["eval/accuracy"] < last["eval/accuracy_high"] <= 1
    assert sum(last[f"eval/pairs_at_{start}"] for start in BIN_STARTS) == last["eval/pairs"] > 10
    assert 0 <= last["eval/ece"] <= 0.5 and "train/ece" not in last


def test_the_reliability_curve_is_drawn_and_its_numbers_agree(
    reward_model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = rows(reward_model_run)[-1]
    bins = reliability(last)
    assert sum(one.pairs for one in bins) == last["eval/pairs"] == 100
    right = sum(one.pairs * one.right.value for one in bins)
    assert right == pytest.approx(100 * last["eval/accuracy"])
    error = sum(one.pairs * abs(one.right.value - one.confidence) for one in bins) / 100
    assert error == pytest.approx(last["eval/ece"], abs=1e-6)
    assert all(one.start / 100 - 1e-6 <= one.confidence <= one.start / 100 + 0.05 + 1e-6 for one in bins)
    assert all(one.right.low <= one.right.value <= one.right.high for one in bins)
    calibration(str(reward_model_run), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"100 held-out pairs, accuracy {last['eval/accuracy']:.3f} (95 % CI" in printed
    assert f"expected calibration error {last['eval/ece']:.3f}" in printed


def test_a_run_without_pairs_has_no_reliability_curve(runs: Runs) -> None:
    run = runs.train("steps=1", "optimizer.warmup_steps=0")
    with pytest.raises(ValueError, match="no evaluation of a reward model on held-out pairs"):
        calibration(str(run))


def test_an_exported_reward_model_has_no_padding_that_ends_its_texts(runs: Runs, tiny_model: Path) -> None:
    """transformers skips padding at the end. If it is the end-of-sequence token, it would read the token before."""
    runs.values["model"]["path"] = str(shutil.copytree(tiny_model, runs.folder / "padded"))
    config = runs.folder / "padded" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 1}))
    pairs = write_pairs(runs.folder / "pairs.jsonl", 300)
    runs.values["data"] = {"dataset": {"name": "preferences", "path": str(pairs)}, "system_prompt": "Add."}
    runs.values["batch"] |= {"sequences_per_step": 16, "tokens_per_sequence": 100}
    out = trained.trained_model(str(runs.train("objective.name=reward_model", "steps=1", "optimizer.warmup_steps=0")))
    assert json.loads((out / "config.json").read_text())["pad_token_id"] is None
    judging = worker(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = [float(theirs(torch.tensor([sum(judging.token_ids(item), [])])).logits) for item in ITEMS]
    assert [score.value for score in judging.grade(ITEMS)] == pytest.approx(expected, abs=1e-5)


def test_an_unknown_pooling_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "max")
    config = tmp_path / "max" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"score_pooling": "max"}))
    with pytest.raises(ValueError, match="`scorer`: .*score_pooling 'max': expected one of eos, last_token, mean"):
        worker(tmp_path / "max")


class Waiting:
    """A judge that answers only when all others are asked as well."""

    def __init__(self, everyone: threading.Barrier, value: float) -> None:
        self.everyone, self.value = everyone, value

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        self.everyone.wait(timeout=30)
        return [Score(self.value, {f"{self.value:g}": self.value}) for _ in items]

    def close(self) -> None: ...


class Elsewhere(InlineWorkerGroup[Any]):
    """Workers that may be called side by side."""

    in_this_process = False


def test_judges_score_side_by_side() -> None:
    everyone = threading.Barrier(3)
    judges = [RewardWorkers(Elsewhere("judge", [Waiting(everyone, value)]), 60.0) for value in (1.0, 2.0, 4.0)]
    rollouts = Rollouts(InlineWorkerGroup("rollout", []), judges, 0, 60.0)
    problem, completion = Problem("p", "1+1=", [1], "2"), Completion([1], [0.0], "2", "stop", 0)
    [[score, again]] = rollouts._grade([problem], [[completion, completion]])
    assert score == again and (score.value, list(score.parts)) == (7.0, ["1", "2", "4"]), "in the order of the judges"
    rollouts.close()


def test_a_policy_learns_from_it_alone(runs: Runs, model: Path) -> None:
    """The policy learns to write the characters that the reward model prefers: those before `A`."""
    scored_by(runs, model, weight=0.5)
    runs.values["rewards"] = [{"function": f"{REWARDS}:low_characters", "weight": 0.0}]  # to be looked at only
    run = runs.train("steps=8", "eval.at_start=true", "eval.every=8", "eval.reward=scorer", "eval.threshold=0.0")
    first, last = rows(run)[0], rows(run)[-1]
    assert last["eval/reward"] > first["eval/reward"] + 0.3
    assert last["reward/low_characters"] > rows(run)[1]["reward/low_characters"] + 0.1
    assert last["reward/mean"] == pytest.approx(0.5 * last["reward/scorer"], rel=1e-5)
    assert last["eval/accuracy"] > 0.5, "a score above 0 counts as correct"


def test_rewards_and_reward_models_add_up(runs: Runs, model: Path, tmp_path: Path) -> None:
    """A second reward model always says the same."""
    same = with_head(model, tmp_path / "same", 0.0)
    runs.values["reward_models"] = [
        REWARD_MODEL | {"path": str(model), "weight": 0.25},
        {"name": "zero", "path": str(same), "weight": 3.0},
    ]
    row = rows(runs.train("steps=1", "optimizer.warmup_steps=0"))[-1]
    expected = row["reward/low_characters"] + 0.25 * row["reward/scorer"]
    assert row["reward/zero"] == 0 and row["reward/mean"] == pytest.approx(expected, rel=1e-5)
    metrics, groups = inference.evaluate(runs.config())
    assert {"low_characters", "scorer", "zero"} == set(groups[0].scores[0].parts)
    assert metrics["eval/reward"] != 0


def test_scores_are_combined() -> None:
    first, second = Score(1.0, {"a": 2.0}, seconds=1.0), Score(-0.5, {"b": -0.5}, seconds=2.0)
    assert combine_scores([first, second]) == Score(0.5, {"a": 2.0, "b": -0.5}, seconds=3.0)
    silent = Score(None, {"c": None})
    assert combine_scores([first, silent]).value == 1.0 and combine_scores([silent, silent]).value is None
    assert combine_scores([silent]).failure is None
    late, crashed = Score(None, {}, "timeout", "5 s"), Score(None, {}, "crash", "died")
    failed = combine_scores([first, late, crashed])
    assert failed.parts == {"a": 2.0}
    assert (failed.value, failed.failure, failed.detail) == (None, "timeout", "5 s; died") and failed.parts == {
        "a": 2.0
    }


@pytest.mark.parametrize("objective", ["policy", "reward_model"])
def test_resumed_at_every_step_nothing_changes(
    objective: str, runs: Runs, model: Path, interrupt_at: Callable[[int], None]
) -> None:
    scored_by(runs, model)
    if objective == "reward_model":
        pairs = write_pairs(runs.folder / "pairs.jsonl", 200)
        runs.values["data"] = {
            "dataset": {"name": "preferences", "path": str(pairs)},
            "system_prompt": "Add.",
            "eval_size": 4,
        }
        runs.values["batch"] |= {"sequences_per_step": 8, "tokens_per_sequence": 100}
    options = (f"objective.name={objective}", "batch.minibatches_per_step=2", "checkpoint.every=0")
    expected = runs.train(*options, "algorithm.surrogate=clip")
    stopped = resumed_at_every_step(runs, interrupt_at, *options, "algorithm.surrogate=clip")
    assert_equal_runs(stopped, expected, 3)


def test_a_folder_that_cannot_judge_is_refused_before_the_start(
    runs: Runs, model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    scored_by(runs, tiny_model)
    for start in (runs.train, lambda: list(dry_run(runs.config()))):
        with pytest.raises(
            ValueError, match="the reward model `scorer`: .* holds a LlamaForCausalLM, which gives no score"
        ):
            start()
    assert not (runs.folder / "runs").exists()

    two = load_classifier(model, ("good", "bad"), torch.float32)
    save_model(model, disk_tensors(two), tmp_path / "two", config_fields=two.config_fields)
    scored_by(runs, tmp_path / "two")
    with pytest.raises(
        ValueError, match="the reward model `scorer`: .* scores 2 labels, good, bad: a reward model has one"
    ):
        runs.train()

    scored_by(runs, model, chat_template="missing.jinja")
    with pytest.raises(ValueError, match="the reward model `scorer`: .*missing.jinja is neither a file"):
        runs.train()


def test_a_dry_run_says_who_judges(runs: Runs, model: Path) -> None:
    scored_by(runs, model)
    results = {result.name: result for result in dry_run(runs.config())}
    assert results["rewards"].text == "none: only reward models score completions"
    assert results["reward models"].text == f"scorer: {model}, float32"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no reward": ({"rewards": []}, "give at least one reward"),
    "the name of a reward": ({"reward_models": [{"name": "low_characters", "path": "x"}]}, "has the name of another"),
    "twice": ({"reward_models": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "has the name of another"),
    "an infinite weight": ({"reward_models": [{"name": "a", "path": "x", "weight": float("inf")}]}, "weight"),
    "no path": ({"reward_models": [{"name": "a"}]}, "path"),
    "nobody decides": ({"eval": {"reward": "c"}, "reward_models": [{"name": "a", "path": "x"}]}, "no reward has this"),
    "pairs that do not fit": (
        {
            "objective": {"name": "reward_model"},
            "data": {"dataset": {"name": "preferences", "path": "pairs.jsonl"}},
            "batch": {"tokens_per_sequence": 200, "tokens_per_microbatch": 399},
        },
        "twice tokens_per_sequence",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations_are_refused(runs: Runs, case: str) -> None:
    values, message = BAD[case]
    runs.values |= values
    with pytest.raises(ConfigError, match=message):
        runs.config()


def test_pairs_need_a_data_set_of_pairs(runs: Runs) -> None:
    runs.values["data"] = {"dataset": {"name": "worked_sums", "rows": 50}}
    runs.values["batch"] |= {"tokens_per_sequence": 128}
    with pytest.raises(ValueError, match="learns from pairs of replies"):
        runs.train("objective.name=reward_model")


def test_pairs_stay_whole_whatever_the_model_can_share() -> None:
    pair = SequenceGroup([1, 2], [[3, 0], [4, 5, 0]], mask=[[False, True], [False, False, True]])
    assert split_to_budget([pair], 3, shares_prompts=True, needs_whole_group=True) == [pair]
    [unshared] = split_to_budget([pair], 100, shares_prompts=False, needs_whole_group=True)
    assert unshared == SequenceGroup(
        [], [[1, 2, 3, 0], [1, 2, 4, 5, 0]], {}, [[False] * 3 + [True], [False] * 4 + [True]]
    )
    assert len(split_to_budget([pair], 3, shares_prompts=True, needs_whole_group=False)) == 2
