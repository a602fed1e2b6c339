"""A model of a few thousand weights with a tokenizer and chat template, and runs of it that take seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmquest_rl.data.tokenizer import load_tokenizer
from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors
from tests.trainer.sources.pair_cases import write_pairs
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.loop import train
from trainer.run.metric_table import entry
from trainer.run.tracking import JsonLines
from trainer.training_run import TrainingRun

ROOT = Path(__file__).parents[2]
REWARDS = ROOT / "tests" / "trainer" / "sources" / "reward_cases.py"
SPECIAL = ("<|im_start|>", "<|im_end|>")
MARK = "LLMQUEST_TEST_RUN"
"""An environment variable with a different value in each command, which marks processes left running."""
TASK = {"name": "arithmetic", "held_out": 4, "template": "{question}="}
MEASURED = ("time/", "system/", "memory/")
"""Areas of metrics that are measurements: they may differ between equal runs."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 30,000 weights that reads characters; SmolLM2's chat template."""
    source, folder = tmp_path_factory.mktemp("shape"), tmp_path_factory.mktemp("model")
    characters = [*SPECIAL, "\n", *map(chr, range(32, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[1], additional_special_tokens=[*SPECIAL]
    )
    fast.chat_template = load_tokenizer(resolve_model("smollm2-135m-instruct")).chat_template
    fast.save_pretrained(source)
    shape = replace(
        LlamaConfig.tiny(), vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, initializer_range=0.2
    )
    (source / "config.json").write_text(json.dumps({**shape.to_hf(), "eos_token_id": 1}))
    save_model(source, disk_tensors(new_model(source, torch.float32, seed=3)), folder)
    return folder


@dataclass
class Runs:
    """Starts runs of the tiny model in a temporary folder."""

    folder: Path
    values: dict[str, Any]
    commands: list["Command"] = field(default_factory=list)

    def config(self, *overrides: str) -> Config:
        return load_config(self.write(), overrides)

    def write(self) -> Path:
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.values))
        return path

    def train(self, *overrides: str, resume: Path | None = None, replay: Path | None = None) -> Path:
        """Train in this process; returns the run's folder."""
        return train(self.config(*overrides), resume, replay)

    def command(self, *arguments: str | Path) -> "Command":
        """Start `llmquest-rl train` in a new process."""
        mark = f"{self.folder}-{len(self.commands)}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", MARK: mark}
        line = [sys.executable, "-m", "trainer.cli.main", "train", str(self.write()), *map(str, arguments)]
        output = (self.folder / f"output-{len(self.commands)}.txt").open("w+")
        process = subprocess.Popen(
            line, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        self.commands.append(Command(process, mark, Path(output.name)))
        return self.commands[-1]

    def newest(self, name: str = "tiny") -> Path:
        return sorted((self.folder / "runs" / name).iterdir())[-1]


@dataclass
class Command:
    """A command under way."""

    process: "subprocess.Popen[bytes]"
    mark: str
    output: Path
    seen: set[psutil.Process] = field(default_factory=set)

    def wait(self, timeout_s: float = 120) -> tuple[int, str]:
        """Wait for the end of the process; return its exit code and its output."""
        code = self.process.wait(timeout_s)
        return code, self.output.read_text()

    def interrupt(self) -> None:
        """Signal every process of the group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def left(self) -> list[psutil.Process]:
        """Running processes that the command started: present and earlier descendants, and processes with its mark."""
        if self.process.poll() is None:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        self.seen |= {process for process in psutil.process_iter() if _environment(process).get(MARK) == self.mark}
        return [process for process in self.seen if process.is_running() and _environment(process)]

    def assert_nothing_left(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        assert self.process.poll() is not None, "it must have ended itself"
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, [(process.pid, process.cmdline()) for process in left]

    def end(self) -> None:
        for process in self.left():
            process.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


@pytest.fixture
def runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """RL on two-digit sums with a reward that differs between samples; everything inline, three steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Runs(tmp_path, tiny_values(tiny_model))
    yield made
    for command in made.commands:
        command.end()


@pytest.fixture(scope="session")
def reward_model_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a reward model that was trained to prefer characters before `A`, which takes some seconds."""
    folder = tmp_path_factory.mktemp("scorer")
    pairs = write_pairs(folder / "pairs.jsonl", 6000)
    values = tiny_values(tiny_model) | {
        "name": "scorer",
        "steps": 120,
        "objective": {"name": "reward_model", "center": 0.01},
        "data": {"dataset": {"name": "preferences", "path": str(pairs)}, "system_prompt": "Add.", "eval_size": 100},
        "batch": {"sequences_per_step": 64, "tokens_per_sequence": 100, "tokens_per_microbatch": 4096},
        "optimizer": {"lr": 3.0e-3, "schedule": "cosine", "warmup_steps": 5},
        "eval": {"every": 120, "at_start": True},
        "checkpoint": {"every": 0, "best_metric": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Runs(folder, values).train()


def tiny_values(tiny_model: Path) -> dict[str, Any]:
    """RL on two-digit sums with a reward that differs between samples; everything inline, three steps."""
    return {
        "name": "tiny",
        "steps": 3,
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "algorithm": {"name": "grpo", "beta": 0.0},
        "data": {"task": TASK, "max_prompt_tokens": 128, "system_prompt": "Add.", "eval_size": 4},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 4, "tokens_per_microbatch": 256},
        "rollout": {"dtype": "float32", "sampling": {"max_tokens": 8}, "timeout_s": 60},
        "rewards": [{"function": f"{REWARDS}:low_characters"}],
        "graders": {"processes": 1},
        "optimizer": {"lr": 1.0e-2, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
        "learner": {"timeout_s": 60},
        "eval": {"every": 2, "at_start": False},
        "checkpoint": {"every": 1, "keep_last": 2, "best_metric": None},
        "tracking": {"trackers": []},
        "cluster": {"kind": "inline", "cpus_per_learner": 1, "cpus_per_rollout_worker": 1, "start_timeout_s": 120},
    }


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C at the end of a step, as the operating system delivers it."""
    record = TrainingRun.record

    def interrupt(at: int) -> None:
        def record_and_interrupt(self: TrainingRun, step: int, *arguments: Any) -> None:
            if step == at:
                os.kill(os.getpid(), signal.SIGINT)
            record(self, step, *arguments)

        monkeypatch.setattr(TrainingRun, "record", record_and_interrupt)

    return interrupt


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without measurements. Every key must be in the table of metrics."""
    logged = JsonLines(run / "metrics.jsonl").read()
    assert {key for row in logged for key in row if entry(key) is None} == {"step"}
    return [
        {key: value for key, value in row.items() if not key.startswith(MEASURED) and not key.endswith("_per_s")}
        for row in logged
    ]


def saved(run: Path, step: int) -> dict[str, Any]:
    """A checkpoint's weights as bytes, and its optimizer's tensors."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    weights = {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}
    assert weights, f"{folder} has no weights"
    files = sorted((folder / "learner").glob("*_states.pt"))
    state = {path.name: _tensors(torch.load(path, weights_only=False)) for path in files}
    return {"weights": weights, "state": state}


def _tensors(value: Any) -> Any:
    """Tensors as lists of their bits, so that nested states can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()
    if isinstance(value, dict):
        return {str(key): _tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else repr(type(value))


def assert_equal_runs(run: Path, expected: Path, step: int) -> None:
    """Bit for bit: metrics, weights and the optimizer's state."""
    assert rows(run) == rows(expected)
    assert saved(run, step) == saved(expected, step)
