"""What the user configures of a reward model that judges rollouts."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmquest_rl.options import Options


class RewardModelConfig(Options):
    """One model that scores completions: `{name: helpful, path: runs/helpful/model, weight: 1.0}`."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """The label in logs, different from those of `rewards` and of other reward models."""
    path: str
    """A folder in the Hub's layout, or a Hub id, of a sequence classifier with one label: what training with the
    objective `reward_model` exports."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of its score in the total; 0 = only logged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of its weights and arithmetic; `auto` as for the model that is trained."""
    workers: PositiveInt = 1
    """Processes that each hold the whole model; the completions of a step are shared out among them."""
    system_prompt: str | None = None
    """As `data.system_prompt` of its training."""
    chat_template: str | None = None
    """As `data.chat_template` of its training: a Jinja template or a file with one, `none` for texts as they are; null
    = its tokenizer's own."""
    max_tokens: PositiveInt | None = None
    """Longest prompt and completion together, in tokens, that it judges: a longer one is unscored (`invalid`); null =
    as many as it knows positions."""
    tokens_per_batch: PositiveInt = 8192
    """Most tokens of one forward pass; a memory knob only."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for the scores of one step, in seconds."""
