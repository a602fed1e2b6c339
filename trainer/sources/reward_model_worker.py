"""A frozen reward model that scores rollouts, with the same `grade` as `rewards.grader.Grader`."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from llmquest_rl.algorithms.ratios import mean_of_sequence
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.conversation import split_at_last_reply
from llmquest_rl.data.pairs import SplitIds, group_for_scoring, read_ids
from llmquest_rl.data.rows import DataError
from llmquest_rl.data.tokenizer import PromptRenderer, load_tokenizer, prompt_renderer
from llmquest_rl.models.checkpoint.hub import check_model_files
from llmquest_rl.models.checkpoint.load_save import load_any_model, read_shape
from llmquest_rl.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from llmquest_rl.packing import pack
from llmquest_rl.types import Pooling, Score
from rewards.types import GradeItem
from rollout.engine import cpu_threads
from trainer.config.reward_model import RewardModelConfig
from trainer.learner.microbatches import split_to_budget


@dataclass(frozen=True, slots=True)
class RewardModelSetup:
    """The setup of every process of one reward model."""

    config: RewardModelConfig
    model_path: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1


def check_reward_model(setup: RewardModelSetup) -> PromptRenderer:
    """Check a reward model without reading a weight; returns the renderer of its prompts.

    Raises:
        ValueError: it is not a text classifier with one label, a file is missing, or it has no chat template; the
            message names the reward model.
    """
    config, path = setup.config, setup.model_path
    try:
        hf, shape = read_shape(path)
        if not issubclass(hf.model, SequenceClassifier):
            raise ValueError(
                f"{path} holds a {hf.architecture}, which gives no score: train a model with the objective "
                "reward_model, or give a sequence classifier (...ForSequenceClassification)"
            )
        if len(shape.labels) != 1:
            raise ValueError(
                f"{path} scores {len(shape.labels)} labels, {', '.join(shape.labels)}: a reward model has one"
            )
        check_model_files(path)
        return prompt_renderer(load_tokenizer(path), config.system_prompt, config.chat_template)
    except ValueError as error:
        raise ValueError(f"the reward model `{config.name}`: {error}") from error


class RewardModelWorker:
    """Scores completions with a reward model. It is a plain class, which the cluster turns into an actor."""

    def __init__(self, setup: RewardModelSetup) -> None:
        """Load the model.

        Raises:
            ValueError: see `check_reward_model`.
        """
        self.setup = setup
        self.renderer = check_reward_model(setup)
        self.device = torch.device(setup.device)
        model = load_any_model(setup.model_path, getattr(torch, setup.dtype), self.device)
        assert isinstance(model, SequenceClassifier), "`check_reward_model` allows no other model"
        self.model = model.eval().requires_grad_(False)
        shape: SequenceClassifierConfig = model.config
        self.pooling: Pooling = shape.pooling or "eos"
        self.max_tokens = min(shape.max_positions, setup.config.max_tokens or shape.max_positions)

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item, in order. An item that the model cannot read gets the failure `invalid`."""
        started = time.perf_counter()
        conversations: dict[int, SplitIds] = {}
        errors: dict[int, str] = {}
        for number, item in enumerate(items):
            try:
                conversations[number] = self.token_ids(item)
            except DataError as error:
                errors[number] = str(error)
        scores = self._scores(items, conversations)
        seconds = (time.perf_counter() - started) / max(1, len(items))
        return [self._score(scores.get(number), errors.get(number), seconds) for number in range(len(items))]

    def token_ids(self, item: GradeItem) -> SplitIds:
        """The tokens of prompt and completion, exactly as in a training pair with this prompt and reply.

        Raises:
            DataError: the chat template refuses the prompt, or there are too many tokens, or none.
        """
        row = {"prompt": item.prompt, "completion": item.completion}
        conversation = split_at_last_reply(row, self.renderer)
        read = read_ids(conversation, self.pooling, self.renderer.tokenizer.eos_token_id)
        length = sum(map(len, read))
        if length > self.max_tokens:
            raise DataError(
                f"prompt and completion are {length} tokens, but the reward model reads {self.max_tokens} at most"
            )
        if length == 0:
            raise DataError("prompt and completion are empty, so there is no token to read the score at")
        return read

    def close(self) -> None:
        """Free the model; the worker cannot be used afterwards. Idempotent."""
        self.__dict__.pop("model", None)

    def _score(self, value: float | None, error: str | None, seconds: float) -> Score:
        name, weight = self.setup.config.name, self.setup.config.weight
        if value is None or not math.isfinite(value):
            reason = error or (
                f"the score is {value}: its weights may be damaged, or its numbers too large for {self.setup.dtype}"
            )
            return Score(None, {}, "invalid", f"the reward model `{name}`: {reason}", seconds)
        return Score(weight * value, {name: value}, None, "", seconds, {name: weight})

    @torch.no_grad()
    def _scores(self, items: Sequence[GradeItem], conversations: dict[int, SplitIds]) -> dict[int, float]:
        """The model's score of each item that has tokens, by its number."""
        found: dict[int, float] = {}
        budget = self.setup.config.tokens_per_batch
        with cpu_threads(self.setup.threads):
            groups = list(self._sequence_groups(items, conversations))
            for sequence_groups in pack(
                split_to_budget(groups, budget, self.model.shares_prompts, needs_whole_group=False), budget
            ):
                batch = collate(sequence_groups).to(self.device)
                scores = mean_of_sequence(self.model(batch).values[:, 0], batch.sequence_ids).tolist()
                numbers = mean_of_sequence(batch.token_fields["items"].double(), batch.sequence_ids)
                found |= zip(numbers.long().tolist(), scores, strict=True)
        return found

    def _sequence_groups(
        self, items: Sequence[GradeItem], conversations: dict[int, SplitIds]
    ) -> Iterator[SequenceGroup]:
        """Group neighbouring items with the same prompt; the token field `items` holds the numbers of the items."""
        for _, numbers in groupby(conversations, key=lambda number: items[number].prompt):
            group = list(numbers)
            scored = group_for_scoring([conversations[number] for number in group], self.pooling)
            yield scored.with_constants("items", [float(number) for number in group])
