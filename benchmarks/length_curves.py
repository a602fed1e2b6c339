"""Cost by sequence length of sliding window, latent attention and gated delta rule, compared with transformers.

    python benchmarks/length_curves.py [--lengths 256 512 ...] [--threads 2] [--plot FILE.png] [--out FILE.json]

Each is one layer on one sequence in float32, and the fastest of several runs after a warm-up run. Ours and that of
transformers have the same weights and inputs, and the script compares their results before it measures.

* Sliding window: forward and backward of a Gemma 3 attention layer, and of our layer without a window. Beyond the
  window ours should grow linearly with the length, the others quadratically.
* Latent attention: a decode step of a DeepSeek-V3 attention layer with `length` cached tokens, and the bytes per cached
  token. Ours attends to the latents; transformers computes keys and values of all of them again at every step.
* Gated delta rule: forward and backward of the rule in chunks, compared with transformers in chunks and token by token;
  and a decode step after `length` tokens, which should take the same time after any length.

Masks, index tensors, cosines and sines are computed beforehand, because all layers of a model share them. Numbers in
brackets are multiples of our time. The exponent below each column is that of the last two doublings, log2 of the ratio
of times: 1 = linear, 2 = quadratic.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache, Gemma3TextConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import AttentionContext, PackedAttention
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import SlotCache
from llmquest_rl.layers.attention.mla import LatentAttention, LatentShape
from llmquest_rl.layers.recurrent.delta_rule import gated_delta_rule, gated_delta_step
from llmquest_rl.layers.rope import RoPE
from llmquest_rl.models import gemma3
from trainer.run.plot import COLOURS

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LONGEST_RECURRENT = 1024
"""Maximum tokens for training token by token, which is too slow for more."""
MIN_SECONDS = 0.2
"""Minimum time over which short runs are repeated, because the best of three milliseconds means little."""
LARGEST_DIFFERENCE = 1e-3
"""Maximum difference between two results relative to the largest entry: float32 rounding over thousands of tokens."""

Run = Callable[[], Tensor]
"""Computes once and returns the output for the comparison."""
SAME = {"transformers": "ours", "transformers, recurrent": "ours", "transformers, step": "ours, step"}
"""Our curve by the curve of transformers that computes the same."""
Rule = Callable[..., tuple[Tensor, Tensor]]
"""A delta rule, which returns outputs and the last state."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers of a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward_backward(forward: Run, leaves: Sequence[Tensor]) -> Run:
    """A run that computes the output and the gradients of all leaves; it returns only the output."""

    def run() -> Tensor:
        out = forward()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    return run


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy their weights into ours; both list them in the same order."""
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))


def window_runs(length: int) -> dict[str, Run]:
    """Forward and backward of a Gemma 3 attention layer: 8 heads of size 64 on 2 key/value heads."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    layers = {"num_hidden_layers": 2, "layer_types": [gemma3.SLIDING, gemma3.FULL], "sliding_window": 512}
    config = Gemma3TextConfig(**heads, **layers, hidden_size=512, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs, shape = Gemma3Attention(config, 0), gemma3.Gemma3Config.from_hf(config.to_dict())
    sliding, full = gemma3.Attention(shape, 0), gemma3.Attention(shape, 1)
    same_weights(sliding, theirs)
    x, layout = random(length, config.hidden_size).requires_grad_(), Layout((length,), (-1,))
    positions, context = layout.positions(), PackedAttention(layout, "cpu")
    rotaries = {kind: RoPE(shape.head_dim, shape.rope[kind])(positions, x.dtype) for kind in shape.layer_types}
    rotary = Gemma3RotaryEmbedding(config)(x, positions[None], gemma3.SLIDING)
    mask = create_sliding_window_causal_mask(config, x[None], attention_mask=None, past_key_values=None)
    forwards: dict[str, tuple[nn.Module, Run]] = {
        "ours": (sliding, lambda: sliding(x, rotaries[gemma3.SLIDING], context)),
        "transformers": (theirs, lambda: theirs(x[None], rotary, mask)[0]),
        "ours, no window": (full, lambda: full(x, rotaries[gemma3.FULL], context)),
    }
    return {name: forward_backward(run, [x, *layer.parameters()]) for name, (layer, run) in forwards.items()}


class LatentLayers:
    """A DeepSeek-V3 attention layer with 8 heads, ours and theirs, each with a cache of `length` tokens."""

    def __init__(self, length: int) -> None:
        latent = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "v_head_dim": 128, "hidden_size": 1024}
        self.config = DeepseekV3Config(**latent, **heads, num_hidden_layers=1, attn_implementation="sdpa")
        torch.manual_seed(0)
        self.theirs = DeepseekV3Attention(self.config, 0).eval()
        self.ours = LatentAttention(LatentShape(1024, 8, None, 512, 128, 64, 128, (128 + 64) ** -0.5), 0)
        same_weights(self.ours, self.theirs)
        self.length, self.x, self.positions = length, random(length + 1, 1024), torch.arange(length + 1)
        self.rope, self.their_rope = RoPE(64, self.config.rope_parameters), DeepseekV3RotaryEmbedding(self.config)
        self.prompts, self.cache = SlotCache(1, length), DynamicCache(config=self.config)
        for run in self.runs(slice(length), PrefillContext(self.prompts, Layout((length,), (-1,)), [0])).values():
            run()

    def runs(self, rows: slice, context: AttentionContext) -> dict[str, Run]:
        """Run the layers on some rows, which their caches store."""
        x, positions = self.x[rows], self.positions[rows]
        rotary, their_rotary = self.rope(positions, x.dtype), self.their_rope(x, positions[None])
        runs: dict[str, Run] = {
            "ours": lambda: self.ours(x, rotary, context),
            "transformers": lambda: self.theirs(x[None], their_rotary, None, self.cache)[0],
        }
        return {name: torch.inference_mode()(run) for name, run in runs.items()}

    def steps(self) -> dict[str, Run]:
        """Run the layers on one more token, which is then removed from the caches."""
        context = DecodeContext(self.prompts, [self.length], SlotCache(1, 1), [0], [0])
        runs = self.runs(slice(self.length, None), context)

        def without_trace() -> Tensor:
            out = runs["transformers"]()
            self.cache.crop(-1)
            return out

        return {**runs, "transformers": without_trace}

    def bytes_per_token(self) -> dict[str, int]:
        """Bytes per token in both caches, and in a cache of full keys and values."""
        full, latents = DynamicCache(config=self.config), self.cache.layers[0]
        with torch.inference_mode():
            full.update(*self.theirs.expand_kv(latents.keys, latents.values), 0)
        held = {"transformers": latents, "keys and values of all heads": full.layers[0]}
        theirs = {name: (layer.keys.nbytes + layer.values.nbytes) // self.length for name, layer in held.items()}
        return {"ours": self.prompts.num_bytes // self.length, **theirs}


def delta_runs(length: int) -> dict[str, Run]:
    """The rule with 4 heads of size 128: forward and backward over `length` tokens, and one step after them."""
    heads, size, layout = 4, 128, Layout((length,), (-1,))
    q, k, v = (random(length + 1, heads, size, seed=i) for i in range(3))
    g, beta = -F.softplus(random(length + 1, heads)), random(length + 1, heads, seed=1).sigmoid()
    whole = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)
    seen, new = [x[:length].clone().requires_grad_() for x in whole], [x[length:] for x in whole]

    def ours(rule: Rule, inputs: Sequence[Tensor], last: Layout | Tensor) -> tuple[Tensor, Tensor]:
        return rule(inputs[0] * size**-0.5, *inputs[1:], last)  # theirs scales queries itself

    def theirs(rule: Rule, inputs: Sequence[Tensor], state: Tensor | None = None) -> Tensor:
        return rule(*(x[None] for x in inputs), initial_state=state, output_final_state=state is not None)[0]

    with torch.no_grad():
        state = ours(gated_delta_rule, seen, layout)[1]
    trained: dict[str, Run] = {
        "ours": lambda: ours(gated_delta_rule, seen, layout)[0],
        "transformers": lambda: theirs(qwen3_next.torch_chunk_gated_delta_rule, seen),
    }
    if length <= LONGEST_RECURRENT:
        trained["transformers, recurrent"] = lambda: theirs(qwen3_next.torch_recurrent_gated_delta_rule, seen)
    return {name: forward_backward(run, seen) for name, run in trained.items()} | {
        "ours, step": torch.no_grad()(lambda: ours(gated_delta_step, new, state)[0]),
        "transformers, step": torch.no_grad()(lambda: theirs(qwen3_next.torch_recurrent_gated_delta_rule, new, state)),
    }


@dataclass
class Mechanism:
    """A mechanism to measure, and its measured curves."""

    title: str
    runs: Callable[[int], dict[str, Run]]
    """Runs by name, for a length."""
    note: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Milliseconds by name and length."""

    def measure(self, length: int, repeats: int) -> None:
        """Add a point to each curve.

        Raises:
            RuntimeError: results that should be equal differ.
        """
        runs = self.runs(length)
        outputs = {name: run().flatten() for name, run in runs.items()}  # also warms up
        for name, ours in SAME.items():
            if name in outputs:
                difference = (outputs[name] - outputs[ours]).abs().max() / outputs[ours].abs().max()
                if not difference <= LARGEST_DIFFERENCE:
                    raise RuntimeError(f"{self.title}, length {length}: {name} and {ours} differ by {difference:.1e}")
        for name, run in runs.items():
            self.curves.setdefault(name, {})[length] = 1000 * best_of(run, repeats)

    def cell(self, name: str, length: int) -> str:
        """A time as text, with its ratio to ours."""
        time_ms = self.curves[name].get(length)
        if time_ms is None:
            return "-"
        return f"{time_ms:.2f}" + (f" ({time_ms / self.curves[SAME[name]][length]:.2f}x)" if name in SAME else "")

    def exponent(self, name: str) -> str:
        """The exponent over the last three points, i.e. two doublings."""
        points = sorted(self.curves[name].items())[-3:]
        (shorter, before), (longer, after) = points[0], points[-1]
        return f"{math.log(after / before) / math.log(longer / shorter):.2f}" if longer > shorter else "-"


def best_of(run: Run, repeats: int) -> float:
    """Seconds of the fastest of several runs of a function that has run before."""
    times: list[float] = []
    while len(times) < repeats or sum(times) < MIN_SECONDS:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def print_table(mechanism: Mechanism, lengths: Sequence[int]) -> None:
    """Print times by length, and the exponents."""
    table = Table(title=f"{mechanism.title}, ms")
    for heading in ("length", *mechanism.curves):
        table.add_column(heading, justify="right")
    for length in lengths:
        table.add_row(str(length), *(mechanism.cell(name, length) for name in mechanism.curves))
    table.add_section()
    table.add_row("exponent", *(mechanism.exponent(name) for name in mechanism.curves))
    Console(width=120).print(table, mechanism.note)


def draw(mechanisms: Sequence[Mechanism], out: Path) -> None:
    """Draw a panel for each mechanism with logarithmic axes, so that the slope of a curve is its exponent."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, mechanism in zip(figure.subplots(1, len(mechanisms)), mechanisms, strict=True):
        for colour, (name, curve) in zip(COLOURS, mechanism.curves.items(), strict=False):
            style = "o-" if name.startswith("ours") else "o--"
            label = f"{name}: exponent {mechanism.exponent(name)}"
            axes.plot(list(curve), list(curve.values()), style, markersize=4, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(title=mechanism.title, xlabel=f"tokens\n{mechanism.note}", ylabel="ms", yscale="log")
        axes.grid(color="#E5E5E5")
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if min(args.lengths) < 1:
        parser.error("--lengths: a sequence has at least 1 token")
    torch.set_num_threads(args.threads)
    lengths = sorted(set(args.lengths))
    kept = LatentLayers(lengths[0]).bytes_per_token()
    note = "bytes kept for each token: " + ", ".join(f"{name} {size}" for name, size in kept.items())
    mechanisms = [
        Mechanism("Window of 512: forward + backward", window_runs),
        Mechanism("Latent attention: decode step", lambda length: LatentLayers(length).steps(), note),
        Mechanism("Gated delta rule: forward + backward, step", delta_runs),
    ]
    for mechanism in mechanisms:
        for length in lengths:
            mechanism.measure(length, args.repeats)
        print_table(mechanism, lengths)
    if args.plot:
        draw(mechanisms, args.plot)
    if args.out:
        found = {mechanism.title: mechanism.curves for mechanism in mechanisms}
        args.out.write_text(json.dumps({"threads": args.threads, "bytes": kept, "ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
