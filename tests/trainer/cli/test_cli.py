"""The command line, run as a user runs it: output, exit codes, and no traceback for errors of users."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from llmquest_rl.algorithms.preference import presets as preference_presets
from llmquest_rl.algorithms.presets import PRESETS, ROWS
from llmquest_rl.models.vit import ViTConfig
from trainer.cli.main import main
from trainer.config.load import ConfigError
from trainer.config.recipes import first_comment

ROOT = Path(__file__).parents[3]
RunCommand = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Runs a command in this process, through the entry point."""

    def run_command(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmquest-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run_command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = {
        "name": "tiny",
        "steps": 2,
        "data": {"task": {"name": "arithmetic"}, "eval_size": 8},
        "rollout": {"engine": {"name": "native"}, "dtype": "float32"},
        "model": {"dtype": "float32"},
        "rewards": [{"name": "exact_number"}],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text("# A tiny recipe\n" + yaml.safe_dump(values))
    return path


def test_algorithms_lists_every_row_with_its_paper(run: RunCommand) -> None:
    """Those of the policy gradient and those of preferences."""
    result = run("algorithms")
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith(" ")}
    assert [name for name in lines if name != "name"] == [*PRESETS, *preference_presets.ROWS]
    for name, row in (ROWS | preference_presets.ROWS).items():
        assert row.paper in lines[name]
    assert "0.1 x sigmoid" in lines["orpo"] and "yes" in lines["dpo"] and "no" in lines["simpo"]
    assert "clip 0.2 / 0.28" in lines["dapo"] and "soft_overlong" in lines["dapo"]


def test_configs_lists_every_recipe_with_what_it_shows(run: RunCommand) -> None:
    result = run("configs")
    assert result.code == 0, result.err
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in result.out
    assert "GRPO teaches SmolLM2" in result.out


def test_reproduce_without_a_name_lists_the_recipes_with_what_they_show(run: RunCommand) -> None:
    result = run("reproduce")
    assert result.code == 0, result.err
    papers = list((ROOT / "configs" / "papers").glob("*.yaml"))
    listed = [line for line in result.out.splitlines() if "configs/papers/" in line]
    assert len(listed) == len(papers) > 5
    for path in papers:
        [line] = [line for line in listed if f"configs/papers/{path.name} " in line]
        assert first_comment(path)[:20] in line


def test_an_unknown_paper_is_an_error_that_lists_the_known_ones(run: RunCommand) -> None:
    result = run("reproduce", "grpo_curves")
    assert result.code == 2
    assert "no recipe 'grpo_curves'" in result.err and "grpo_curve," in result.err and "Traceback" not in result.err


def test_help_names_every_command_without_loading_torch(run: RunCommand) -> None:
    code = "import sys, trainer.cli.main; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    text = run("--help").out
    training = ("train", "eval", "generate", "rollout", "export", "plot", "pipeline", "calibration")
    for command in (*training, "grade", "parity", "models", "algorithms", "configs", "reproduce", "doctor"):
        assert f" {command} " in text


def test_an_error_of_the_user_is_one_message_and_exit_code_2(run: RunCommand, recipe: Path) -> None:
    result = run("train", recipe, "optimizer.lrr=1")
    assert result.code == 2
    assert "command line: optimizer.lrr: unknown key; did you mean lr" in result.err
    assert "Traceback" not in result.err


def test_debug_shows_where_an_error_arose(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmquest-rl", "train", str(recipe), "optimizer.lrr=1", "--debug"])
    with pytest.raises(ConfigError):  # it is not caught, so Python prints its traceback
        main()


def test_a_wrong_option_is_exit_code_2(run: RunCommand) -> None:
    assert run("train", "--no-such-option").code == 2


def test_resume_without_a_run_says_so(
    run: RunCommand, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", recipe, "--resume")
    assert result.code == 2
    assert "runs/tiny" in result.err and "Traceback" not in result.err


def test_a_dry_run_checks_everything_and_starts_nothing(
    run: RunCommand, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", recipe, "--dry-run")
    assert result.code == 0, result.err
    assert "completions per step" in result.out
    assert "the gold answers of 10 rows score as correct" in result.out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_when_the_gold_answer_is_not_correct(run: RunCommand, recipe: Path, tmp_path: Path) -> None:
    reward = tmp_path / "wrong.py"
    reward.write_text("def never(completion, answer):\n    return 0.0\n")
    result = run("train", recipe, f"rewards=[{{function: '{reward}:never'}}]", "--dry-run")
    assert result.code == 1
    assert "the gold answers of 10 of 10 rows do NOT score as correct" in result.out


def test_a_vision_language_model_is_assembled_and_sees_pictures(
    run: RunCommand, recipe: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vision, language, out = tmp_path / "vit.json", tmp_path / "llama.json", tmp_path / "vlm"
    vision.write_text(json.dumps(ViTConfig.tiny().to_hf()))
    language.write_text((tiny_model / "config.json").read_text())
    result = run(
        "assemble", vision, language, out, "--image-token", "~", "--frozen", "vision.*", "--tokenizer", tiny_model
    )
    assert result.code == 0, result.err
    assert "~ (id 97) marks image positions" in result.out
    config = json.loads((out / "config.json").read_text())
    assert (config["frozen"], config["image_token_id"], config["eos_token_id"]) == (["vision.*"], 97, 1)
    pictures = ("data.task={name: shapes, held_out: 8}", f"model.path={out}", "rollout.sampling.max_tokens=8")
    result = run("train", recipe, *pictures, "--dry-run")
    assert result.code == 0, result.err
    assert "prompts: none dropped; 157 to 159 tokens" in result.out
    for part, token, says in (
        (tiny_model, "~", "exists and is not empty"),
        (
            tiny_model,
            "<img>",
            "no token '<img>': choose one that never occurs in texts, such as <|im_end|>, <|im_start|>",
        ),
        (tmp_path / "nowhere", "~", "is not a model reference"),
    ):
        folder = out if token == "~" and part == tiny_model else tmp_path / "other"
        result = run("assemble", vision, part, folder, "--image-token", token)
        assert (result.code, says in result.err) == (2, True), result.err
        assert not (tmp_path / "other").exists()


def test_grade_writes_the_rows_in_order_and_a_summary(run: RunCommand, tmp_path: Path) -> None:
    rows = [{"completion": "It is 4", "answer": "4"}, {"completion": "5", "answer": "4"}]
    file, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("grade", "--reward", "exact_number", file, "--out", out)
    assert result.code == 0, result.err
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == [1.0, 0.0]
    assert "2 rows" in result.out


def test_plot_of_nothing_is_an_error_of_the_user(run: RunCommand, tmp_path: Path) -> None:
    result = run("plot", tmp_path / "none")
    assert result.code == 2 and "Traceback" not in result.err


def test_export_of_a_missing_run_is_an_error_of_the_user(run: RunCommand, tmp_path: Path) -> None:
    result = run("export", tmp_path / "none", tmp_path / "out")
    assert result.code == 2 and "Traceback" not in result.err
