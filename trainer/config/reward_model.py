"""Options of a reward model that scores rollouts."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmquest_rl.options import Options


class RewardModelConfig(Options):
    """One model that scores completions: `{name: helpful, path: runs/helpful/model, weight: 1.0}`."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Label in logs; it must differ from the names of `rewards` and of other reward models."""
    path: str
    """A folder in the Hub's layout, or a Hub id, of a sequence classifier with one label. `llmquest-rl export` writes
    such a folder from a run with the objective `reward_model`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of the score in the total reward; 0 = the score is only logged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and arithmetic; `auto` as for `model.dtype`."""
    workers: PositiveInt = 1
    """Number of processes. Each holds the complete model; they divide the completions of a step."""
    system_prompt: str | None = None
    """System message in front of every prompt; use the `data.system_prompt` that the model was trained with."""
    chat_template: str | None = None
    """The `data.chat_template` that the model was trained with: a Jinja template, a file that holds one, or `none` for
    plain text; null = the tokenizer's own."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens of prompt and completion together. Longer ones stay unscored (`invalid`); null = the number of
    positions of the model."""
    tokens_per_batch: PositiveInt = 8192
    """Maximum tokens in one forward pass. It sets memory use, not results."""
    timeout_s: PositiveFloat = 600.0
    """Time limit in seconds for the scores of one step."""
