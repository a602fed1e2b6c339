"""The data that packages exchange: Problem, Request, Completion, Score, Group. No torch: graders start fast.

A task gives a `Problem`. A rollout worker answers a `Request` with `Completion`s, and graders give each a `Score`. The
problem with its completions and scores is a `Group`, from which the learner's batch is packed (`llmquest_rl.batch`).
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

Pooling = Literal["eos", "last_token", "mean"]
"""Where a reward model reads its score: at the end-of-sequence token after the reply, at the last token of the reply
itself (the end-of-sequence token is left out), or as the mean over the reply's tokens."""


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """The format of a model's images, and the tokens that represent an image in a prompt."""

    token_id: int
    """The reserved token id of a vision token; texts never contain it."""
    tokens: int
    """Number of vision tokens per image."""
    channels: int
    height: int
    """Height in pixels; images of other sizes are resized."""
    width: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem to solve: the prompt, and the gold answer and columns that rewards need to score a completion."""

    id: str
    """Stable identity, e.g. `gsm8k/train/17`; seeds, logs and replays refer to it."""
    prompt: str | list[Message]
    """The prompt of the data set, before the chat template."""
    prompt_ids: list[int]
    """Token ids `[prompt tokens]` with the chat template applied, ready for generation."""
    answer: Any
    """The gold answer, in the form that the task's reward expects."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All further columns of the data set; rewards get them as keyword arguments."""
    images: "NDArray[float32] | None" = field(default=None, compare=False)
    """The normalised images of the prompt `[n, channels, height, width]`, in order; None = text only."""
    reference_prompt_ids: list[int] | None = None
    """Token ids of the prompt that the reference model reads, e.g. with the gold answer; None = the same prompt."""


class Sampling(Options):
    """The way tokens are sampled. An engine returns log-probs under the distribution that it sampled from."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divisor of the logits; 0 = greedy decoding, whose log-probs are those at temperature 1."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep tokens at least min_p times as likely as the most likely one; 0 keeps all."""
    max_tokens: int = Field(default=256, ge=1)
    """Maximum length of a completion in tokens, with the end-of-sequence token."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion. The text is cut before the string, but the tokens of the string stay."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed `n` times."""

    prompt_ids: list[int]
    n: int
    seed: int
    """Completion i is sampled with a generator seeded by (seed, i), so it does not depend on the rest of the batch."""
    images: "NDArray[float32] | None" = field(default=None, compare=False)
    """See `Problem.images`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation."""

    token_ids: list[int]
    """Sampled token ids, with the end-of-sequence token if it was sampled."""
    logprobs: list[float]
    """The engine's log-probs `[len(token_ids)]` of the sampled tokens, under the distribution that was sampled from."""
    text: str
    """The decoded text without special tokens, cut before a stop string."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that sampled the completion."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one completion. If `value` is None it is unscored, and left out of the baseline and the loss."""

    value: float | None
    """The weighted total."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """The value of each reward by name, before weighting; None = the reward does not apply."""
    failure: str | None = None
    """The kind of failure, `timeout`, `memory`, `crash`, `exception` or `invalid`; None = no failure."""
    detail: str = ""
    """The error message of a failure."""
    seconds: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each reward in the total, by name; `parts` also has components, which have none."""


@dataclass(frozen=True, slots=True)
class Group:
    """A problem with its completions and their scores: the unit of advantage estimation and of packing."""

    problem: Problem
    completions: list[Completion]
    scores: list[Score]
