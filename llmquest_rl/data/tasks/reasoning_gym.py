"""Endless problems of reasoning-gym's generators (Stojanovski et al. 2025, arXiv:2505.24760), made offline.

Each row has the column `entry`: reasoning-gym's own dict of question, answer and metadata. The reward `reasoning_gym`
needs it to score a completion.
"""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llmquest_rl.compat.reasoning_gym import import_reasoning_gym
from llmquest_rl.data.rows import DataError, MalformedRows, Row
from llmquest_rl.data.task import Draw, Task, generated_task
from llmquest_rl.loader import did_you_mean
from llmquest_rl.options import Options

CHUNK = 500
"""Problems generated from one seed. Some generators prepare all their problems at once, so a chunk stays small."""


class Part(Options):
    """One of several data sets."""

    dataset: str
    """Its name in reasoning-gym, e.g. `chain_sum`."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of its generator, e.g. `{min_terms: 2, max_terms: 3}`."""
    weight: PositiveFloat = 1.0
    """Relative frequency with which problems are drawn from it."""


class Config(Options):
    """The generators, and the prompt that asks their questions."""

    dataset: str | None = None
    """Name of one data set, e.g. `chain_sum`; or give several as `datasets`."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the generator of `dataset`."""
    datasets: tuple[Part, ...] = ()
    """Several data sets, drawn from by weight."""
    template: str = "{question}"
    """The prompt; `{question}` is replaced by the question."""
    held_out: PositiveInt = 100
    """Distinct questions set aside for evaluation; at most a quarter of those found in a small space."""

    @model_validator(mode="after")
    def _one_or_several(self) -> "Config":
        if (self.dataset is None) == (not self.datasets):
            raise ValueError("give either `dataset` (one) or `datasets` (several)")
        if self.datasets and self.parameters:
            raise ValueError("with `datasets`, parameters belong to each of them")
        if "{question}" not in self.template:
            raise ValueError("`template` must contain {question}")
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The data sets, one or several."""
        return self.datasets or (Part(dataset=self.dataset or "", parameters=self.parameters),)


def load(config: Config, seed: int, malformed: MalformedRows) -> Task:
    """Open the task.

    Raises:
        DataError: a data set is unknown, or its generator refuses the parameters.
    """
    parts = config.parts
    items = [_generator(part, seed, i) for i, part in enumerate(parts)]
    weights = [part.weight for part in parts]
    name = "+".join(part.dataset for part in parts)

    def draw(index: int) -> Draw:
        chosen = random.Random(f"{seed}/part/{index}").choices(range(len(parts)), weights)[0]
        entry = items[chosen](index)
        question = entry["question"]
        prompt = config.template.replace("{question}", question)
        return Draw(Row(str(index), prompt, entry["answer"], {"entry": entry}), question.strip())

    return generated_task(name, draw, config.held_out, seed)


def _generator(part: Part, seed: int, number: int) -> Callable[[int], dict[str, Any]]:
    """A function from an index to the data set's problem of that number, the same for the same index."""
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS, create_dataset

    if part.dataset not in DATASETS:
        raise DataError(f"reasoning-gym has no data set {part.dataset!r}{did_you_mean(part.dataset, sorted(DATASETS))}")
    reserved = {"seed", "size"} & part.parameters.keys()
    if reserved:
        raise DataError(
            f"{part.dataset}: `{min(reserved)}` cannot be set: the run's seed decides, and problems have no end"
        )

    @lru_cache(maxsize=4)
    def chunk(chunk_number: int) -> Any:
        chunk_seed = random.Random(f"{seed}/{number}/{chunk_number}").randrange(2**31)
        try:
            return create_dataset(part.dataset, seed=chunk_seed, size=CHUNK, **part.parameters)
        except (TypeError, ValueError, AssertionError) as error:
            known = ", ".join(sorted(DATASETS[part.dataset][1].__dataclass_fields__.keys() - {"seed", "size"}))
            raise DataError(f"{part.dataset} refuses {part.parameters}: {error}. Its parameters: {known}") from error

    chunk(0)

    def item(index: int) -> dict[str, Any]:
        chunk_number, offset = divmod(index, CHUNK)
        drawn = chunk(chunk_number)[offset]
        metadata = {"source_dataset": part.dataset, **drawn["metadata"]}
        return {"question": drawn["question"], "answer": drawn["answer"], "metadata": metadata}

    return item
