"""Distillation in whole runs: from a teacher of another shape, from the model itself with a hint, and from a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.weight_map import disk_tensors
from tests.trainer.conftest import Runs, assert_equal_runs, rows
from tests.trainer.test_resume import resumed_at_every_step
from trainer.cli.dry_run import dry_run
from trainer.config.load import ConfigError
from trainer.learner.learner import Learner

ON_POLICY = {"name": "reinforce", "aggregation": "token_mean"}


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tiny model's tokenizer, and another shape and vocabulary size."""
    source, folder = tmp_path_factory.mktemp("teacher-shape"), tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny_model, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = json.loads((tiny_model / "config.json").read_text())
    changes = {"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": shape["vocab_size"] + 9}
    (source / "config.json").write_text(json.dumps(shape | changes))
    save_model(source, disk_tensors(new_model(source, torch.float32, seed=5)), folder)
    return folder


def on_policy(runs: Runs, **objective: Any) -> Runs:
    runs.values["objective"] = {"name": "distill", **objective}
    runs.values["algorithm"] = ON_POLICY
    return runs


def offline(runs: Runs, teacher: Path, **objective: Any) -> Runs:
    """Runs on replies of random words."""
    runs.values["objective"] = {"name": "distill", "source": "dataset", "teacher": str(teacher), **objective}
    del runs.values["algorithm"]
    path = runs.folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": f"{i * i} {i}"}) for i in range(200)))
    dataset = {"name": "sft", "path": str(path)}
    runs.values["data"] = {"dataset": dataset, "system_prompt": "Square.", "eval_size": 10}
    runs.values["batch"] = {"sequences_per_step": 16, "tokens_per_sequence": 100, "tokens_per_microbatch": 800}
    return runs


def test_on_policy_the_student_comes_near_its_teacher(teacher: Path, runs: Runs) -> None:
    on_policy(runs, teacher=str(teacher))
    options = ("optimizer.lr=1e-2", "optimizer.schedule=constant", "checkpoint.every=0", "eval.every=0")
    found = rows(runs.train("steps=12", "batch.prompts_per_step=8", *options))
    assert found[0]["policy/logp_gap"] < 1e-4
    assert found[-1]["train/reverse_kl"] < found[0]["train/reverse_kl"] - 0.2


def test_an_engine_scores_as_the_learners_do(teacher: Path, runs: Runs) -> None:
    on_policy(runs, teacher=str(teacher), hint="{prompt} {answer}")
    options = ("steps=1", "optimizer.warmup_steps=0", "eval.every=0")
    expected = rows(runs.train(*options))
    for found, known in zip(rows(runs.train(*options, "objective.scored_by=engine")), expected, strict=True):
        assert found == pytest.approx(known, rel=1e-3, abs=1e-5)


def test_the_model_itself_is_the_teacher_with_a_hint(runs: Runs, interrupt_at: Callable[[int], None]) -> None:
    """The teacher takes over the student's weights after every second step, also after a resume."""
    on_policy(runs, hint="{prompt} {answer}", teacher_sync_interval=2)
    options = ("batch.minibatches_per_step=2", "algorithm.surrogate=clip", "checkpoint.every=0", "eval.every=0")
    expected = runs.train(*options)
    assert all(row["train/reverse_kl"] != 0 for row in rows(expected))
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *options), expected, 3)
    plain = rows(runs.train("steps=1", "optimizer.warmup_steps=0", "objective.hint='{prompt}'"))
    assert plain[0]["train/reverse_kl"] == pytest.approx(0.0, abs=1e-5), "without a hint it knows nothing more"


def test_offline_from_all_tokens_and_from_a_file_of_the_most_likely(
    teacher: Path, runs: Runs, interrupt_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(runs, teacher)
    options = ("batch.minibatches_per_step=2", "eval.every=1", "eval.at_start=true")
    live = runs.train(*options)
    found = rows(live)
    assert found[-1]["eval/kl"] < found[0]["eval/kl"] and found[-1]["train/nll"] > 0
    runs.values["objective"] |= {"cache": str(runs.folder / "cache" / "top.safetensors"), "top_k": 999}
    for with_file, without in zip(rows(runs.train(*options)), found, strict=True):
        assert with_file == pytest.approx(without, rel=1e-4, abs=1e-6), "all tokens are kept, so nothing is lost"
    monkeypatch.setattr(Learner, "top_tokens", None)  # the file is there: no teacher is asked
    expected = runs.train(*options, "checkpoint.every=0")
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *options, "checkpoint.every=0"), expected, 3)


def test_a_file_of_another_teacher_of_other_data_or_of_other_tokens_is_refused(
    teacher: Path, tiny_model: Path, runs: Runs
) -> None:
    offline(runs, teacher, cache=str(runs.folder / "top.safetensors"), top_k=4)
    one = ("steps=1", "optimizer.warmup_steps=0", "eval.every=0", "checkpoint.best_metric=null")
    few = rows(runs.train(*one))[0]["train/kl"]
    assert 0 < few < rows(runs.train(*one, "objective.cache=null", "objective.top_k=64"))[0]["train/kl"]
    for change, name in (
        (f"objective.teacher={tiny_model}", "another teacher"),
        ("objective.top_k=5", "another top_k"),
        ("data.system_prompt='Cube.'", "another data set"),
    ):
        with pytest.raises(ValueError, match=f"top.safetensors was made with {name}"):
            runs.train(*one, change)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a":', '"§":').replace('"b":', '"a":').replace('"§":', '"b":'))
    on_policy(runs, teacher=str(other))
    message = r"other has another tokenizer than the model .* token \d+ is 'b' there and 'a' here"
    with pytest.raises(ValueError, match=message):
        runs.train()
    with pytest.raises(ValueError, match="another tokenizer"):
        list(dry_run(runs.config()))
    with pytest.raises(ValueError, match=r"supports \d+ positions, but sequences may have 100128 tokens"):
        on_policy(runs, teacher=str(tiny_model)).train(
            "rollout.sampling.max_tokens=100000", "batch.tokens_per_microbatch=200000"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.teacher": "null"}, "name a `teacher`"),
        ({"algorithm.name": "grpo"}, "takes its advantages from the teacher"),
        ({"algorithm.beta": 0.1}, r"would change nothing: beta: 0\.1"),
        ({"objective.source": "dataset"}, "the objective learns from given sequences"),
        ({"objective.scored_by": "engine", "rollout.sampling.temperature": 0.5}, "an engine scores at temperature 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str, runs: Runs) -> None:
    on_policy(runs, teacher="teacher")
    with pytest.raises(ConfigError, match=message):
        runs.config(*(f"{key}={value}" for key, value in changes.items()))
