"""Speed of the learner compared with transformers and the machine's limit, with shared and with repeated prompts.

    python benchmarks/learner_step.py [--dtype float32] [--prompt 48] [--completion 32] [--groups 16] [--out FILE.json]

Each row is one update of GRPO's loss on the same tokens: forward and backward without the optimizer.

* `shared`: our learner as it runs: packed microbatches, in which each prompt is computed once for its 8 completions;
* `repeated`: our learner with the prompt repeated for every completion, as a model without sharing computes it;
* `transformers`: its model on padded rows, 32 at a time, with its fastest attention (sdpa), log-probs gathered from
  logits.

Tokens/s count the tokens of the data (each prompt once, and each completion), so that all rows do the same work. The
limit is the time that the model's matrix products would take at the speed of this machine, measured in the same run.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.layers import linear
from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.objectives import policy
from llmquest_rl.packing import pack
from llmquest_rl.types import Sampling

GROUP = 8
TOKENS_PER_MICROBATCH, ROWS_PER_MICROBATCH = 2048, 32


def matmul_flops(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a matrix product with a typical shape of the model, with the faster of the two libraries."""
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    kernels: list[Callable[[], Tensor]] = [lambda: a @ b.T, lambda: linear.product(a, b.T)]
    return 2 * 1024 * 576 * 1536 * max(rate(kernel, seconds) for kernel in kernels)


def rate(run: Callable[[], Any], seconds: float) -> float:
    """Calls per second."""
    for _ in range(5):
        run()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            run()
        count += 10
    return count / (time.perf_counter() - started)


def sequence_groups(groups: int, prompt: int, completion: int) -> list[SequenceGroup]:
    """Groups of random tokens; the completions have between half of the given length and all of it."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 40000, (length,), generator=generator).tolist()

    result = []
    for _ in range(groups):
        lengths = torch.randint(completion // 2, completion + 1, (GROUP,), generator=generator).tolist()
        names = ("weights", "advantages", "rollout_logprobs")
        token_fields = {name: [[0.01] * length for length in lengths] for name in names}
        result.append(SequenceGroup(tokens(prompt), [tokens(length) for length in lengths], token_fields))
    return result


def best_of(run: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of several runs after a warm-up run."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def ours(path: Path, dtype: torch.dtype, data: list[SequenceGroup]) -> Callable[[], None]:
    model = load_model(path, dtype)
    objective = policy.build(policy.Config(), resolve("grpo", {"beta": 0.0}), Sampling())
    microbatches = [collate(part) for part in pack(data, TOKENS_PER_MICROBATCH)]

    def run() -> None:
        model.zero_grad()
        for batch in microbatches:
            objective.loss(model, batch).value.backward()

    return run


def theirs(path: Path, dtype: torch.dtype, data: list[SequenceGroup]) -> Callable[[], None]:
    """An update with transformers: right-padded rows, logits only at the completion tokens, as TRL computes them."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    model.train()
    rows = [(sequence_group.prompt, completion) for sequence_group in data for completion in sequence_group.completions]
    width = max(len(completion) for _, completion in rows)
    prompt = len(rows[0][0])
    ids = torch.zeros(len(rows), prompt + width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (head, tail) in enumerate(rows):
        ids[i, : prompt + len(tail)] = torch.tensor([*head, *tail])
        mask[i, : prompt + len(tail)] = 1

    def run() -> None:
        model.zero_grad()
        for part, seen in zip(ids.split(ROWS_PER_MICROBATCH), mask.split(ROWS_PER_MICROBATCH), strict=True):
            logits: Tensor = model(input_ids=part, attention_mask=seen, logits_to_keep=width + 1).logits[:, :-1].float()
            logprobs = logits.log_softmax(-1).gather(-1, part[:, prompt:, None])[..., 0]
            loss = -((logprobs - logprobs.detach()).exp() * 0.01 * seen[:, prompt:]).sum()
            loss.backward()

    return run


def flops(parameters: int, head: int, tokens: int, targets: int) -> float:
    """FLOPs of forward and backward without attention: 6 per weight and token; the head computes only targets."""
    return 6.0 * ((parameters - head) * tokens + head * targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    dtype, path = getattr(torch, args.dtype), resolve_model("smollm2-135m-instruct")
    shared = sequence_groups(args.groups, args.prompt, args.completion)
    repeated = [part for sequence_group in shared for part in sequence_group.expanded()]
    speed = matmul_flops(dtype)
    model = load_model(path, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    del model
    data_tokens = sum(sequence_group.num_tokens for sequence_group in shared)
    targets = sum(len(completion) for sequence_group in shared for completion in sequence_group.completions)
    cases: dict[str, tuple[Callable[[], None], int]] = {
        "shared": (ours(path, dtype, shared), data_tokens),
        "repeated": (ours(path, dtype, repeated), sum(sequence_group.num_tokens for sequence_group in repeated)),
        "transformers": (theirs(path, dtype, shared), sum(sequence_group.num_tokens for sequence_group in repeated)),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, (run, computed) in cases.items():
        seconds = best_of(run, args.repeats)
        limit = flops(parameters, head, computed, targets) / speed
        rows[name] = {"seconds": seconds, "tokens_per_s": data_tokens / seconds, "share_of_limit": limit / seconds}
    sizes = f"{args.groups} groups of {GROUP}, prompt {args.prompt}, completions <= {args.completion}, {args.dtype}"
    table = Table(title=f"{sizes}; matrix products here: {speed / 1e9:.0f} GFLOP/s")
    for heading in ("", "s per update", "tokens/s", "x transformers", "share of the matmul limit"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        ratio = row["tokens_per_s"] / rows["transformers"]["tokens_per_s"]
        cells = (f"{row['seconds']:.2f}", f"{row['tokens_per_s']:.0f}", f"{ratio:.2f}", f"{row['share_of_limit']:.0%}")
        table.add_row(name, *cells)
    Console(width=120).print(table)
    if args.out:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.write_text(json.dumps({"arguments": arguments, "gflops": speed / 1e9, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
