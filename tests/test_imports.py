"""Processes start fast: each kind of process imports only the heavy packages that it uses.

Each case runs in a separate process, because an import stays in effect.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMPILER = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
"""Modules that torch imports for `torch.compile`, in one to two seconds."""
SERVERS = ("ray", "vllm", "deepspeed", "accelerate")
READ_ALL = """
from pathlib import Path
from trainer.cli.check_configs import load_recipe_or_pipeline
for path in [*Path("configs").glob("*.yaml")]:
    load_recipe_or_pipeline(path)
"""
MISTYPED = """
from trainer.config.load import ConfigError, load_config
try:
    load_config("configs/quickstart.yaml", ["optimizer.lrr=1"])
except ConfigError as error:
    assert "lr" in str(error)
"""
DRIVER = """
import trainer.loop
from llmquest_rl.models.checkpoint.hub import check_model_files, resolve_model
from llmquest_rl.data.tokenizer import load_tokenizer
path = resolve_model("smollm2-135m-instruct")
check_model_files(path)
load_tokenizer(path)
"""

LEARNER = """
from pathlib import Path
from trainer.components import RunComponents
from trainer.config.load import load_config
from trainer.learner.learner import Learner
config = load_config("configs/quickstart.yaml", ["model.dtype=float32"])
Learner(RunComponents(config).learner_setup(Path("runs"))).close()
"""

WORKER = """
from llmquest_rl.models.checkpoint.hub import resolve_model
from rollout.engine import EngineSetup, engine_config
from rollout.worker import RolloutWorker
path = resolve_model("smollm2-135m-instruct")
RolloutWorker("native", engine_config("native")(), path, EngineSetup(64)).close()
"""

COMMANDS = {
    "train": ["train", "{recipe}", "optimizer.lrr=1"],
    "eval": ["eval", "{recipe}", "optimizer.lrr=1"],
    "generate": ["generate", "{recipe}", "optimizer.lrr=1", "--prompt", "a"],
    "rollout": ["rollout", "{recipe}", "optimizer.lrr=1", "--out", "nowhere"],
    "reproduce": ["reproduce", "{paper}"],
}

ENTRIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "--help": ("import trainer.cli.main", ("torch", "transformers", "numpy", "pydantic", "yaml", *SERVERS)),
    "a mistyped key": (MISTYPED, ("torch", "transformers", "datasets", "safetensors", *SERVERS)),
    "every recipe": (READ_ALL, ("torch", "transformers", "datasets", "safetensors", *SERVERS)),
    "driver, with model and tokenizer": (
        DRIVER,
        ("transformers.generation", "datasets", "matplotlib", *COMPILER, *SERVERS),
    ),
    "learner": ("import trainer.learner.learner", ("transformers", "datasets", *COMPILER, *SERVERS)),
    "learner, built": (LEARNER, ("transformers", "datasets", "torch._dynamo", "ray", "vllm")),
    "native worker, built": (WORKER, ("transformers", "datasets", *COMPILER, *SERVERS)),
    "vLLM worker": ("import rollout.worker, rollout.engines.vllm", ("torch", "transformers", *SERVERS)),
    "grader": ("import rewards.grader, rewards.worker", ("torch", "transformers", "numpy", "sympy", *SERVERS)),
    "reward model": ("import trainer.sources.reward_model_worker", ("transformers", "datasets", *COMPILER, *SERVERS)),
}
"""The first code of each kind of process, and the modules that this code must not import."""


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_process_imports_nothing_heavy_that_it_does_not_use(kind: str) -> None:
    code, forbidden = ENTRIES[kind]
    script = f"{code}\nimport sys\nprint(*sorted(set({forbidden!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_a_mistyped_key_before_its_heavy_imports(command: str, tmp_path: Path) -> None:
    paper = tmp_path / "paper.yaml"
    recipe = (ROOT / "configs/papers/grpo_curve.yaml").read_text()
    paper.write_text(recipe.replace("parts/", f"{ROOT}/configs/papers/parts/").replace("{lr: 7.0e-4}", "{lrr: 1}"))
    arguments = [text.format(recipe="configs/quickstart.yaml", paper=paper) for text in COMMANDS[command]]
    script = f"""
import sys
from trainer.cli.main import main
sys.argv = ["llmquest-rl", *{arguments!r}]
try:
    main()
except SystemExit as end:
    print(end.code, *sorted({{"torch", "transformers", "datasets", "ray", "vllm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "lrr: unknown key; did you mean lr?" in done.stderr
    assert done.stdout.split() == ["2"]
