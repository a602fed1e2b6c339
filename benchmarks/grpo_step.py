"""One GRPO step of ours beside TRL's GRPOTrainer: same model, prompts, samples, token limit, dtype, machine.

    python benchmarks/grpo_step.py [--steps 3] [--dtype float32] [--engine vllm] [--out FILE.json]

Each side runs in a process of its own, one after the other, so that its peak memory (all its processes together) is
its own. The first step of each side is not counted. TRL generates with transformers, since it has no vLLM on CPUs, and
gets the largest batches that are good for it; ours is `llmquest-rl train` as a user runs it, Ray and all.
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
PHASES = ("generation", "training", "weight sync", "total")
Row = dict[str, float]


def config(dtype: str, engine: str, steps: int) -> dict[str, Any]:
    """Our side's run: the quickstart's task with the benchmark's sizes, without evaluation and checkpoints."""
    return {
        "name": "benchmark",
        "steps": steps,
        "seed": SEED,
        "model": {"path": "smollm2-135m-instruct", "dtype": dtype},
        "algorithm": {"name": "grpo", "beta": 0.0},
        "data": {"task": {"name": "arithmetic", "digits": 2}, "max_prompt_tokens": 96},
        "batch": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "uniform_rewards": "take"},
        "rollout": {"engine": {"name": engine}, "dtype": dtype, "sampling": {"max_tokens": MAX_TOKENS}},
        "rewards": [{"name": "exact_number"}],
        "optimizer": {"lr": LR},
        "eval": {"every": 0},
        "checkpoint": {"every": 0, "best_metric": None},
        "tracking": {"trackers": []},
    }


def run_ours(args: argparse.Namespace) -> list[Row]:
    """Rows by step from the run's own metrics."""
    from trainer.config_load import parse_config
    from trainer.loop import train

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = train(parse_config(config(args.dtype, args.engine, args.steps + 1)))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "generation": row["time/generate_s"],
            "training": row["time/learner_prepare_s"] + row["time/learner_update_s"],
            "weight sync": row["time/sync_s"],
            "total": row["time/step_s"],
            "tokens": row["rollout/tokens"],
        }
        for row in rows[1:]
    ]


def run_trl(args: argparse.Namespace) -> list[Row]:
    """Rows by step; generation and the whole step are timed around TRL's own methods."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from llmquest_rl.data.tokenizer import load_tokenizer
    from rewards.exact_number import Config, reward
    from trainer.config_load import parse_config
    from trainer.parts import Parts

    parts = Parts(parse_config(config(args.dtype, "native", args.steps + 1)))
    samples = parts.prompts.take(PROMPTS * (args.steps + 1))
    rows = [{"prompt": [{"role": "user", "content": s.prompt}], "answer": str(s.answer)} for s in samples]
    times: list[Row] = []

    class Timed(GRPOTrainer):
        """The trainer, with a clock."""

        def _generate(self, *positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = super()._generate(*positional, **named)
            times.append({"generation": time.perf_counter() - started})
            return result

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
    model = AutoModelForCausalLM.from_pretrained(parts.model_path, dtype=getattr(torch, args.dtype))
    trainer = Timed(
        model=model,
        reward_funcs=exact,
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(parts.model_path),
    )
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Marks the ends of steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            row = times[-1]
            row["total"] = time.perf_counter() - self.started
            row["training"] = row["total"] - row["generation"]
            row["weight sync"] = 0.0

    trainer.add_callback(Clock())
    trainer.train()
    key = "completions/mean_length"
    lengths = [entry[key] for entry in trainer.state.log_history if key in entry]
    for row, length in zip(times, lengths, strict=False):
        row["tokens"] = length * PROMPTS * SAMPLES
    return times[1:]


SIDES = {"ours": run_ours, "trl": run_trl}


def measure(side: str, arguments: list[str]) -> tuple[Row, float]:
    """One side in a fresh process: its mean row, and the peak of its processes' memory (proportional share) in GB."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *arguments, "--side", side, "--rows", str(out)]
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        peak = 0.0
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(2.0):  # reading it costs the measured side a little
                peak = max(peak, tree_memory_gb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
        if code:
            raise SystemExit(f"{side} ended with exit code {code}")
        rows = json.loads(out.read_text())
    return {key: fmean(row[key] for row in rows) for key in (*PHASES, "tokens")}, peak


def tree_memory_gb(pid: int) -> float:
    """Memory of a process and its descendants; pages shared between them count once (PSS)."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that is not")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--trl-batch", type=int, default=32, help="TRL's per_device_train_batch_size")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows_file = args.rows.resolve()
        rows_file.write_text(json.dumps(SIDES[args.side](args)))
        return
    results = {side: measure(side, sys.argv[1:]) for side in SIDES}
    sizes = f"{PROMPTS} x {SAMPLES}, <= {MAX_TOKENS} tokens, {args.dtype}, {os.cpu_count()} cores"
    table = Table(title=f"one GRPO step: SmolLM2-135M, {sizes}")
    for heading in ("", "ours", "TRL", "TRL / ours"):
        table.add_column(heading, justify="right")
    (ours, our_peak), (trl, trl_peak) = results["ours"], results["trl"]
    for phase in PHASES:
        ratio = f"{trl[phase] / ours[phase]:.1f}" if trl[phase] else ""
        table.add_row(f"{phase} (s)", f"{ours[phase]:.2f}", f"{trl[phase]:.2f}", ratio)
    table.add_row("completion tokens", f"{ours['tokens']:.0f}", f"{trl['tokens']:.0f}", "")
    table.add_row("peak memory (GB)", f"{our_peak:.2f}", f"{trl_peak:.2f}", f"{trl_peak / our_peak:.2f}")
    Console().print(table)
    if args.out:
        sides = {side: {**row, "peak_memory_gb": peak} for side, (row, peak) in results.items()}
        args.out.write_text(json.dumps({"dtype": args.dtype, "engine": args.engine, **sides}, indent=1) + "\n")


if __name__ == "__main__":
    main()
