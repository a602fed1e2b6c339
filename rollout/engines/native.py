"""The native engine: our own model, in this process, drawing with `llmquest_rl.generation`.

The default wherever vLLM is not installed, the reference that other engines are checked against, and the one whose runs
can be resumed bit for bit: see `llmquest_rl.generation.engine` for what its exactness depends on.
"""

import json
from pathlib import Path

from pydantic import Field

from llmquest_rl.deferred import torch
from llmquest_rl.options import Options
from rollout.decoding import Decoder
from rollout.engine import EngineSetup, RolloutEngine, check_context


class Config(Options):
    """Options of the native engine."""

    cache_tokens: int = Field(default=65536, ge=1)
    """Most tokens whose keys and values are kept at the same time, a group's prompt counted once; completions that find
    no room wait. In bytes it is this times 8 (float32 keys and values) x layers x key/value heads x head size."""
    pack_weights: bool = True
    """Keep a second copy of the weights in the order of the CPU's kernels: less time for more memory. Of no effect on a
    GPU."""
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    """Round the weights to so many bits, as a quantised engine would hold them, whenever they are loaded; null = not.
    For experiments on the mismatch between engine and learner: neither memory nor time is saved."""


def check(model_path: Path, config: Config, setup: EngineSetup) -> None:
    """Whether the architecture is one of ours and was trained for that much context.

    Raises:
        ValueError: it is not; the message says why.
    """
    from llmquest_rl.models.hf import find_architecture

    path = model_path / "config.json"
    if not path.exists():
        raise ValueError(f"{model_path} has no config.json: give a folder of the Hugging Face layout")
    values = json.loads(path.read_text(encoding="utf-8"))
    shape = find_architecture(values, path).config.from_hf(values)
    check_context(model_path, getattr(shape, "max_positions", None), setup)


def build(model_path: Path, config: Config, setup: EngineSetup) -> RolloutEngine:
    """Put an engine around the model of a folder, with random weights where the folder has none."""
    from llmquest_rl.models.hf import load_model, new_model
    from rollout.native_engine import NativeEngine

    dtype = getattr(torch, setup.dtype)
    if any(model_path.glob("*.safetensors")):
        model = load_model(model_path, dtype, setup.device)
    else:
        model = new_model(model_path, dtype, setup.device, setup.seed)
    return NativeEngine(model, Decoder(model_path), setup, config.cache_tokens, config.pack_weights, config.weight_bits)
