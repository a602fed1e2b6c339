"""The differences between vLLM and an architecture here, as data: each model's file states its own. Imports no vLLM."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VllmLimits:
    """The configurations of an architecture that vLLM 0.32 computes as transformers does, by the fields of config.json.

    An architecture gets one after `tests/rollout/test_vllm_families.py` has compared vLLM with transformers and with
    our own model, before and after a live update of the weights.
    """

    required: Mapping[str, Any] = field(default_factory=dict)
    """Fields that config.json must contain, each with transformers' default value, because vLLM has another default."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Fields that vLLM ignores or restricts, with the only value that it computes; a missing field has this value."""
    problems: Callable[[Any], Iterable[str]] | None = None
    """Other differences: a function of the model's configuration (such as a `Qwen2Config`) that yields a sentence about
    each one. The caller puts "vLLM cannot serve ...:" before them."""
