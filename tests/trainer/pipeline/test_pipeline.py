"""Pipelines: the stages of RLHF with a tiny model, kept, resumed and repeated, and files that are refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.conftest import Runs, rows, saved
from tests.trainer.sources.pair_cases import write_pairs
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.tree import ConfigError
from trainer.pipeline.run import FinishedStage, StageStoppedError, run_stages
from trainer.pipeline.stages import load_pipeline

SUPERVISED = {"sequences_per_step": 4, "tokens_per_sequence": 128, "tokens_per_microbatch": 1024}
SHARED = ("model", "learner", "optimizer", "checkpoint", "tracking", "cluster")


@pytest.fixture
def file(runs: Runs) -> Path:
    """Fine-tuning, a reward model and GRPO; two steps each, and three of the last."""
    pairs = write_pairs(runs.folder / "pairs.jsonl", 100)
    data = {"system_prompt": "Add.", "eval_size": 4}
    sums = {"name": "sft", "task": {"name": "arithmetic", "template": "{question}="}, "task_rows": 50}
    judge = {"name": "judge", "path": "stage:scorer", "system_prompt": "Add.", "dtype": "float32"}
    policy = {key: value for key, value in runs.values.items() if key not in (*SHARED, "rewards", "eval")}
    stages = [
        {"name": "base", "objective": {"name": "next_token"}, "data": data | {"dataset": sums}, "batch": SUPERVISED},
        {
            "name": "scorer",
            "objective": {"name": "reward_model"},
            "data": data | {"dataset": {"name": "preferences", "path": str(pairs)}},
            "batch": SUPERVISED,
            "model": {"path": "stage:base"},
        },
        policy
        | {
            "name": "policy",
            "model": {"path": "stage:base@1"},
            "steps": 3,
            "algorithm": {"name": "grpo", "beta": 0.1},
            "batch": policy["batch"] | {"prompts_per_step": 2},
            "reward_models": [judge],
            "eval": {"every": 2, "threshold": 0.0},
        },
    ]
    shared = {key: runs.values[key] for key in SHARED} | {"steps": 2, "eval": {"every": 2}}
    return write(runs.folder, {"shared": shared, "stages": stages})


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "all.yaml"
    path.write_text("# Three stages\n" + yaml.safe_dump(values))
    return path


def train(file: Path, *overrides: str) -> dict[str, FinishedStage]:
    return {stage.name: stage for stage in run_stages(load_pipeline(file, overrides), str(file))}


def how(stages: dict[str, FinishedStage]) -> list[str]:
    return [stage.how for stage in stages.values()]


def test_stages_start_from_each_other_and_are_kept_until_something_changes(file: Path) -> None:
    first = train(file)
    assert list(first) == ["base", "scorer", "policy"] and how(first) == ["trained"] * 3
    base = first["base"].run / "checkpoints"
    config = load_config(first["policy"].run / "config.yaml")
    assert Path(config.model.path).resolve() == base / "step-000001" / "model", "the checkpoint that was asked for"
    assert not Path(config.model.path).is_absolute(), "the project may be moved"
    assert Path(load_config(first["scorer"].run / "config.yaml").model.path).resolve() == base / "step-000002" / "model"
    [judge] = config.reward_models
    scorer = first["scorer"].run / "checkpoints" / "step-000002" / "model"
    assert Path(judge.path).resolve() == scorer
    assert json.loads((scorer / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert rows(first["policy"].run)[1]["policy/kl"] < 1e-6 < rows(first["policy"].run)[-1]["policy/kl"]

    again = train(file)
    assert how(again) == ["kept"] * 3 and [s.run for s in again.values()] == [s.run for s in first.values()]
    later = train(file, "policy.optimizer.lr=0.001")
    assert how(later) == ["kept", "kept", "trained"]
    assert how(train(file, "scorer.optimizer.lr=0.001", "policy.steps=2")) == ["kept", "trained", "trained"]
    assert how(train(file)) == ["kept"] * 3, "earlier runs of these configurations are still there"


@pytest.mark.parametrize("stage", ["base", "policy"])
def test_an_interrupted_stage_goes_on_and_nothing_else_changes(
    file: Path, stage: str, interrupt_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"base": 1, "policy": 2}[stage]
    if stage == "policy":
        train(file, "policy.steps=1", "policy.optimizer.warmup_steps=0")  # the stages before are kept
    interrupt_at(steps)
    with pytest.raises(StageStoppedError, match=f"the stage {stage} was stopped after step {steps} of .*: repeat"):
        train(file)
    interrupt_at(0)
    finished = train(file)
    assert how(finished) == {"base": ["resumed", "trained", "trained"], "policy": ["kept", "kept", "resumed"]}[stage]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = train(file)
    assert how(expected) == ["trained"] * 3
    for name, run in finished.items():
        assert rows(run.run) == rows(expected[name].run)
        last = rows(run.run)[-1]["step"]
        assert saved(run.run, last) == saved(expected[name].run, last)


def change(stages: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [stage | values if i == number else stage for i, stage in enumerate(stages)]


BAD: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = {
    "no stage": (lambda s: [], "stages"),
    "an unknown stage": (
        lambda s: change(s, 1, model={"path": "stage:bas"}),
        "stage:bas: there is no such stage.*base",
    ),
    "itself": (
        lambda s: change(s, 0, model={"path": "stage:base"}),
        "no such stage before this one, this is the first",
    ),
    "a later stage": (lambda s: change(s, 1, model={"path": "stage:policy"}), "no such stage before this one"),
    "no best one": (lambda s: change(s, 1, model={"path": "stage:base@best"}), "that stage has no best checkpoint"),
    "no checkpoint": (lambda s: change(s, 1, model={"path": "stage:base@last"}), "expected `@latest`, `@best` or `@`"),
    "twice": (lambda s: change(s, 1, name="base"), "two stages are called 'base'"),
    "no name": (lambda s: [{k: v for k, v in s[0].items() if k != "name"}], "name: required key is missing"),
    "a mistyped key": (lambda s: change(s, 2, stepz=1), "stages.2: stepz: unknown key; did you mean steps"),
    "inherits nothing": (lambda s: change(s, 0, inherit="missing.yaml"), "missing.yaml: there is no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unsound_file_is_refused_before_anything_starts(file: Path, case: str) -> None:
    changed, message = BAD[case]
    values = yaml.safe_load(file.read_text())
    with pytest.raises(ConfigError, match=message):
        load_pipeline(write(file.parent, values | {"stages": changed(values["stages"])}))


def test_overrides_name_a_stage(file: Path) -> None:
    stages = load_pipeline(file, ["base.steps=7", "shared.seed=3"])
    assert [config.steps for config in stages.values()] == [7, 2, 3]
    assert {config.seed for config in stages.values()} == {3}
    with pytest.raises(ConfigError, match="'steps=7': expected STAGE.KEY=VALUE, with a stage of base, scorer, policy"):
        load_pipeline(file, ["steps=7"])
    with pytest.raises(ConfigError, match="command line: .*stepz: unknown key"):
        load_pipeline(file, ["base.stepz=7"])


def test_a_stage_may_inherit_a_recipe(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    base = values["stages"][0]
    (file.parent / "base.yaml").write_text(yaml.safe_dump(base | {"steps": 9, "seed": 4, "eval": {"every": 3}}))
    values["stages"][0] = {"inherit": "base.yaml", "seed": 8}
    config = load_pipeline(write(file.parent, values))["base"]
    assert (config.steps, config.seed) == (2, 8), "the recipe counts less than `shared`, and this less than the stage"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["llmquest-rl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code if isinstance(ended.value.code, int) else 0


def test_the_command_checks_every_stage_first_and_reports_each(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "pipeline", file, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert all(f"{name}:\n" in printed for name in ("base", "scorer", "policy")) and printed.count("ok  ") > 10
    assert not (file.parent / "runs").exists()

    missing = "scorer.data.dataset.path=missing.jsonl"
    assert command(monkeypatch, "pipeline", file, missing) == 2
    assert "missing.jsonl" in capsys.readouterr().err and not (file.parent / "runs").exists()

    assert command(monkeypatch, "pipeline", file) == 0
    printed = capsys.readouterr().out
    assert "stage 1 of 3: base" in printed and "policy: trained" in printed and "held-out accuracy: " in printed
    assert command(monkeypatch, "pipeline", file, "--dry-run") == 0
    assert "policy" not in capsys.readouterr().out, "all is finished"


def test_the_commands_for_one_run_and_for_several_name_each_other(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    assert command(monkeypatch, "train", file) == 2
    assert "llmquest-rl pipeline" in capsys.readouterr().err
    assert command(monkeypatch, "pipeline", runs.write()) == 2
    assert "llmquest-rl train" in capsys.readouterr().err
