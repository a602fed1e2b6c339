"""The nouns that travel between rooms: Sample, Request, Completion, Score, Group. No torch: graders start fast.

A task yields a `Problem`; a rollout worker answers a `Request` with `Completion`s; graders give each a `Score`;
the three together are a `Group`, from which the learner's batch is packed (see `llmquest_rl.batch`).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmquest_rl.options import Options

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

Message = dict[str, str]
"""One chat message: `{"role": ..., "content": ...}`."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How a model wants its images, and what stands for one in token ids."""

    token_id: int
    """Stands for one vision token: a reserved token, which text never holds."""
    tokens: int
    """Vision tokens of an image."""
    channels: int
    height: int
    """In pixels; images of other sizes are resized."""
    width: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem to solve: what the model is asked, and what a reward needs to judge the answer."""

    id: str
    """Stable identity, e.g. `gsm8k/train/17`: seeds, logs and replays refer to it."""
    prompt: str | list[Message]
    """As the data set has it, before the chat template."""
    prompt_ids: list[int]
    """The tokens that the model sees: chat template applied, ready for generation."""
    answer: Any
    """The gold answer, in whatever form the task's reward expects."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every further column of the data set: rewards receive these as keyword arguments."""
    images: "NDArray[float32] | None" = field(default=None, compare=False)
    """[n, channels, height, width], normalised: what the prompt's image tokens stand for, in order; None = text."""


class Sampling(Options):
    """How tokens are drawn. Log-probs returned by an engine are those of the distribution that was sampled from."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 means greedy decoding (log-probs are then those at temperature 1)."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep tokens at least min_p times as likely as the most likely one; 0 keeps all."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens, the end-of-sequence token included."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion; the text is cut before the string, the tokens that formed it stay."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed `n` times."""

    prompt_ids: list[int]
    n: int
    seed: int
    """Completion i is drawn with a generator seeded from (seed, i): independent of the batch around it."""
    images: "NDArray[float32] | None" = field(default=None, compare=False)
    """As `Problem.images`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation."""

    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included when it was sampled."""
    logprobs: list[float]
    """The engine's own log-probs [len(token_ids)] of the sampled tokens, under the distribution sampled from."""
    text: str
    """Decoded without special tokens, cut before a stop string."""
    finish_reason: FinishReason
    weight_version: int
    """The version of the weights that sampled it."""


@dataclass(frozen=True, slots=True)
class Score:
    """What grading one completion gave. `value is None` means unscored: left out of baseline and loss."""

    value: float | None
    """The weighted total."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """Each reward by name before weighting; None = the reward does not apply to this item."""
    failure: str | None = None
    """None, or the kind of failure: `timeout`, `memory`, `crash`, `exception`, `invalid`."""
    detail: str = ""
    """For a failure: the message that a person needs to find its cause."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """A sample with its completions and their scores: the unit of advantage estimation and of packing."""

    problem: Problem
    completions: list[Completion]
    scores: list[Score]
