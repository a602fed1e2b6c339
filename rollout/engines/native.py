"""The native engine, which runs our own model in this process with `llmquest_rl.generation`.

It is the default where vLLM is not installed, and the reference for tests of other engines. Runs with it can be resumed
bit for bit; `llmquest_rl.generation.engine` lists the conditions.
"""

from pathlib import Path

from pydantic import Field

from llmquest_rl.deferred import torch
from llmquest_rl.options import Options
from rollout.decoding import Decoder
from rollout.engine import EngineSetup, RolloutEngine, check_context


class Config(Options):
    """Options of the native engine."""

    cache_tokens: int = Field(default=65536, ge=1)
    """Maximum number of cached tokens; a prompt counts once for all its completions. Completions wait until there is
    room. A token takes 8 bytes (float32 key and value) x layers x key/value heads x head size."""
    pack_weights: bool = True
    """Store a second copy of the weights in the layout of the CPU's kernels, which is faster but takes more memory. No
    effect on a GPU."""
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    """Round the weights to this many bits on every load, as a quantised engine would; null = no rounding. Use it for
    experiments on the mismatch between engine and learner: it saves neither memory nor time."""


def check(model_path: Path, config: Config, setup: EngineSetup) -> None:
    """Check that the model's architecture is implemented and supports the context length.

    Raises:
        ValueError: the architecture is unknown, its positions are too few, or config.json is missing or damaged.
    """
    from llmquest_rl.models.checkpoint.load_save import read_shape

    _, shape = read_shape(model_path)
    check_context(model_path, getattr(shape, "max_positions", None), setup)


def build(model_path: Path, config: Config, setup: EngineSetup) -> RolloutEngine:
    """Build an engine with the model of a folder, or with random weights if the folder has none."""
    from llmquest_rl.models.checkpoint.load_save import load_model, new_model
    from rollout.native_engine import NativeEngine

    dtype = getattr(torch, setup.dtype)
    if any(model_path.glob("*.safetensors")):
        model = load_model(model_path, dtype, setup.device)
    else:
        model = new_model(model_path, dtype, setup.device, setup.seed)
    return NativeEngine(model, Decoder(model_path), setup, config.cache_tokens, config.pack_weights, config.weight_bits)
