"""One GRPO step compared with TRL's GRPOTrainer: same model, prompts, samples, token limit, dtype and machine.

    python benchmarks/grpo_step.py [--steps 3] [--dtype float32] [--engine vllm] [--out FILE.json]

It measures three sides in turn, each in a process of its own:

* `ours`: `llmquest-rl train` with its defaults, including Ray. Groups whose rewards are all equal have no gradient, so
  they are not computed; the update is the same.
* `every group`: the same with `batch.zero_advantage_groups=take`, which computes all groups, as TRL does.
* `trl`: generates with transformers, because TRL has no vLLM on CPUs, in the batch size that is fastest for it.

The first step of each side is a warm-up and is not counted. Peak memory is the decrease of the machine's free memory,
so the machine must be idle otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

PROMPTS, SAMPLES, MAX_TOKENS, LR, SEED = 16, 8, 32, 1e-5, 0
SECONDS = ("generation", "training", "weight sync", "total")
Row = dict[str, float]


def config(args: argparse.Namespace, zero_advantage_groups: str) -> dict[str, Any]:
    """Configuration of our run: the quickstart with the benchmark's sizes, without evaluation and checkpoints."""
    return {
        "name": "benchmark",
        "steps": args.steps + 1,
        "seed": SEED,
        "model": {"path": "smollm2-135m-instruct", "dtype": args.dtype},
        "algorithm": {"name": "grpo", "beta": 0.0},
        "data": {"task": {"name": "arithmetic", "digits": 2}, "max_prompt_tokens": 96},
        "batch": {
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "tokens_per_microbatch": 2048,
            "zero_advantage_groups": zero_advantage_groups,
        },
        "rollout": {"engine": {"name": args.engine}, "dtype": args.dtype, "sampling": {"max_tokens": MAX_TOKENS}},
        "rewards": [{"name": "exact_number"}],
        "optimizer": {"lr": LR},
        "eval": {"every": 0},
        "checkpoint": {"every": 0, "best_metric": None},
        "tracking": {"trackers": []},
    }


def run_ours(args: argparse.Namespace, zero_advantage_groups: str = "skip") -> list[Row]:
    """One row per step from the metrics of our run."""
    from trainer.config.load import parse_config
    from trainer.loop import train

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = train(parse_config(config(args, zero_advantage_groups)))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "generation": row["time/generate_s"],
            "training": row["time/learner_prepare_s"] + row["time/learner_update_s"],
            "weight sync": row["time/sync_s"],
            "total": row["time/step_s"],
            "completion tokens": row["rollout/tokens"],
            "reward": row["reward/mean"],
        }
        for row in rows
    ]


def run_every_group(args: argparse.Namespace) -> list[Row]:
    """One row per step of our run with every group computed."""
    return run_ours(args, "take")


def run_trl(args: argparse.Namespace) -> list[Row]:
    """One row per step of TRL's run; clocks around its methods time the generation and the step."""
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    times: list[Row] = []

    class Timed(GRPOTrainer):
        """TRL's trainer with a clock around generation."""

        def _generate(self, *positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = super()._generate(*positional, **named)
            times.append({"generation": time.perf_counter() - started})
            return result

    class Clock(TrainerCallback):
        """Times the steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            row = times[-1]
            row["total"] = time.perf_counter() - self.started
            row["training"] = row["total"] - row["generation"]
            row["weight sync"] = 0.0

    trainer = Timed(**trl_arguments(args))
    trainer.add_callback(Clock())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    for row, entry in zip(times, log, strict=True):
        row["completion tokens"] = entry["completions/mean_length"] * PROMPTS * SAMPLES
        row["reward"] = entry["reward"]
    return times


def trl_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the same run for TRL: model, prompts, reward and options."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    from llmquest_rl.data.tokenizer import load_tokenizer
    from rewards.builtin.exact_number import Config, reward
    from trainer.components import RunComponents
    from trainer.config.load import parse_config

    components = RunComponents(parse_config(config(args, "take")))
    problems = components.prompts.take(PROMPTS * (args.steps + 1))
    rows = [{"prompt": [{"role": "user", "content": p.prompt}], "answer": str(p.answer)} for p in problems]

    def exact(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        return [float(reward(c[0]["content"], a, Config()) or 0.0) for c, a in zip(completions, answer, strict=True)]

    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=PROMPTS * SAMPLES // args.trl_batch,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        max_steps=args.steps + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
        shuffle_dataset=False,
    )
    return {
        "model": AutoModelForCausalLM.from_pretrained(components.model_path, dtype=getattr(torch, args.dtype)),
        "reward_funcs": exact,
        "args": options,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": load_tokenizer(components.model_path),
    }


SIDES = {"ours": run_ours, "every group": run_every_group, "trl": run_trl}


def measure(side: str, arguments: list[str]) -> Row:
    """Run one side in a new process; returns the mean of its rows without the first, and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *arguments, "--side", side, "--rows", str(out)]
        free = lowest = psutil.virtual_memory().available
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        done = threading.Event()

        def watch() -> None:
            nonlocal lowest
            while not done.wait(0.2):
                lowest = min(lowest, psutil.virtual_memory().available)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
        if code:
            raise SystemExit(f"{side} ended with exit code {code}")
        rows = json.loads(out.read_text())[1:]
    means = {key: fmean(row[key] for row in rows) for key in rows[0]}
    totals = [row["total"] for row in rows]
    return {**means, "fastest step": min(totals), "slowest step": max(totals), "peak memory": (free - lowest) / 1e9}


def show(results: dict[str, Row], title: str) -> None:
    """Print a table with seconds and gigabytes of each side, and TRL's divided by ours."""
    table = Table(title=title)
    for heading in ("", *results, "trl / ours", "trl / every group"):
        table.add_column(heading, justify="right")
    for key in results["trl"]:
        values = [results[side][key] for side in SIDES]
        timed = key in SECONDS or key == "peak memory"
        ratios = [f"{values[-1] / value:.1f}" if timed and values[-1] else "" for value in values[:-1]]
        table.add_row(key, *(f"{value:.4g}" for value in values), *ratios)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps after one warm-up step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--trl-batch", type=int, default=32, help="TRL's per_device_train_batch_size")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows_file = args.rows.resolve()
        rows_file.write_text(json.dumps(SIDES[args.side](args)))
        return
    results = {side: measure(side, sys.argv[1:]) for side in SIDES}
    sizes = f"{PROMPTS} x {SAMPLES}, <= {MAX_TOKENS} tokens, {args.dtype}, {os.cpu_count()} cores, {args.steps} steps"
    show(results, f"one GRPO step of SmolLM2-135M ({sizes}): seconds, GB")
    if args.out:
        facts = {"dtype": args.dtype, "engine": args.engine, "steps": args.steps}
        args.out.write_text(json.dumps({**facts, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
