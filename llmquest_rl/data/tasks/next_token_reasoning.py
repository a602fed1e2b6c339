"""Next-token reasoning: the model thinks before it predicts how a text goes on (RPT, arXiv:2506.08007).

Any text gives problems: a problem is a position of the text, its prompt shows the text before, and its answer is the
text after it. A proxy model tells which positions are hard to predict. With `predict: masked_span` the prompt also
shows the text behind a gap, and the answer is the gap's content (PretrainZero, arXiv:2512.03442).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from llmquest_rl.data.positions import PositionRows, ScoredText, Selection, check_some, choose
from llmquest_rl.data.raw_text import Columns, Part, RawText, Source, held_out_parts, parts_of
from llmquest_rl.data.rows import DataError, MalformedRows, Row
from llmquest_rl.data.task import Task, open_task
from llmquest_rl.data.tasks import TASKS
from llmquest_rl.data.template import fill, placeholders
from llmquest_rl.data.token_scores import OpenProxy, ProxyModel
from llmquest_rl.options import Options, checked_component, checked_options

TEMPLATES: dict[str, str] = {
    "v0": "Complete the given text under '### Context' by predicting the next token, and wrap it in \\boxed{}. Please "
    "reason step by step to find the most probable next token as the final answer, and enclose it in \\boxed{} (note: "
    "the token may begin with a space, e.g., \\boxed{ para} or \\boxed{ =}; do not use \\text{}).### Context{context}",
    "v6": "Complete the given text wrapped in ``` and ``` by predicting the next token, list multiple potential tokens "
    "and select the most probable one as the final prediction. Wrap your final prediction in \\boxed{} (note: the "
    "token may begin with a space, e.g., \\boxed{ para} or \\boxed{ =}; do not use \\text{}).The context is:"
    "```{context}```, now please predict the next token.",
    "gap": "The text between ``` and ``` has a gap, which is written as [MASK]. Reason step by step about the missing "
    "text. Then write exactly that text in \\boxed{}, with a space at its beginning if it has one.\n```{context}```",
}
"""Prompts by name: two of the paper's (appendix D; its experiments use `v0`, and `v6` scored best before training), and
ours for masked spans."""
MASK = "[MASK]"
READ_WITH = {
    "threshold": ("select", "entropy"),
    "random_share": ("select", "random"),
    "continuation_tokens": ("predict", "next_token"),
    "span_tokens": ("predict", "masked_span"),
}
"""The option and its value with which another option is read."""


class Config(Options):
    """The text, the positions in it, and the prompt."""

    path: str | tuple[str, ...] | None = None
    """Text files, files of rows (jsonl, json, csv, parquet), or a Hub id; glob patterns and lists are allowed. Give
    either this or `task`."""
    subset: str | None = None
    """Hub only: the data set's configuration name."""
    split: str = "train"
    """Hub only: the split to read."""
    columns: Columns = Columns()
    """The column mapping of rows."""
    task: dict[str, Any] | None = None
    """A task, built-in or your own, whose prompts and gold answers are read as questions with answers, e.g.
    `{name: arithmetic, digits: 3}`."""
    task_rows: PositiveInt = 2000
    """Number of training rows taken from `task`, at most."""
    separator: str = "\n\n"
    """Text between a question and its answer. Positions lie in the answer."""
    held_out_path: str | tuple[str, ...] | None = None
    """Separate files for evaluation; null = the held-out rows of `task`, or a share of the documents."""
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the documents set aside without `held_out_path`; a seeded hash chooses them. A single document is
    divided into its parts of `document_tokens`."""
    max_documents: PositiveInt | None = None
    """Maximum number of documents that are read; null = all."""
    document_tokens: int = Field(default=1024, ge=8)
    """Maximum length of a context with its continuation in tokens: longer documents are cut into parts."""
    proxy: str | None = None
    """Model that tells how hard each token is: a folder or Hub id with the same tokenizer; null = the model that is
    trained, as it is before training."""
    scores_file: Path | None = None
    """File that keeps the proxy's scores of the text; null = one in the cache folder, for each model and text. A file
    of another model or text is an error."""
    select: Selection = "entropy"
    """Positions to train on: those with an `entropy` above `threshold`, a `random` share of all, or `all`."""
    threshold: NonNegativeFloat = 1.0
    """For `entropy`: nats of the proxy's 16 most likely tokens above which a position is chosen. The paper calls
    positions above 0.5, 1.0 and 1.5 easy, medium and hard."""
    random_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """For `random`: share of the positions."""
    held_out_threshold: NonNegativeFloat = 0.5
    """Entropy in nats above which a position of the held-out text is evaluated, however the others are chosen."""
    predict: Literal["next_token", "masked_span"] = "next_token"
    """`next_token`: the text before the position is shown. `masked_span`: also that behind a gap of `span_tokens`."""
    continuation_tokens: PositiveInt = 16
    """For `next_token`: maximum length of a prediction; one that is right up to the end of any token is right."""
    span_tokens: PositiveInt = 4
    """For `masked_span`: tokens in the gap. The prediction must be the whole gap."""
    template: str | None = None
    """The prompt: `v0` or `v6` of the paper, `gap`, or your own text with `{context}`; null = `v0`, and `gap` for
    masked spans."""

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if task is None else checked_component(TASKS, task, "{name: arithmetic, digits: 3}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("give either `path` or `task`")
        if "context" not in placeholders(self.prompt_template):
            raise ValueError(f"`template` must be {', '.join(TEMPLATES)}, or contain {{context}}")
        for name, (other, value) in READ_WITH.items():
            if getattr(self, other) != value and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is read with `{other}: {value}` only: leave it out")
        return self

    @property
    def prompt_template(self) -> str:
        """The text of the template."""
        name = self.template or {"next_token": "v0", "masked_span": "gap"}[self.predict]
        return TEMPLATES.get(name, name)


def load(config: Config, seed: int, malformed: MalformedRows, proxy: OpenProxy | None = None) -> Task:
    """Open the task.

    Raises:
        DataError: a file is missing or has too little text, no position is chosen, the proxy has another tokenizer, or
            a row is malformed and `data.malformed_rows` is `error`.
        ValueError: the proxy cannot be loaded, or `scores_file` belongs to another proxy or text.
    """
    if proxy is None:
        raise DataError("next_token_reasoning needs the tokenizer of a run: use it as `data.task` itself")
    opened = proxy(config.proxy)
    train, held_out = scored_sides(config, seed, malformed, opened)
    chosen = choose(train, config.select, config.threshold, config.random_share, seed)
    check_some(chosen, train, "training", "Lower `threshold`, give more text, or set `select: random`")
    evaluated = choose(held_out, "entropy", config.held_out_threshold, 1.0, seed)
    check_some(evaluated, held_out, "held-out", "Lower `held_out_threshold`, or give more held-out text")
    ask = PREDICT[config.predict]
    shown = {ask(held_out[text], position, config).shown for text, position in evaluated}
    kept = [(text, position) for text, position in chosen if ask(train[text], position, config).shown not in shown]
    check_some(kept, train, "training", "All chosen ones are held out as well: give more text")
    counters = {"dropped_malformed_rows": malformed.count, "dropped_overlapping_rows": len(chosen) - len(kept)}

    def make(text: ScoredText, position: int) -> Row:
        return _row(text, position, config, opened)

    def make_held_out(text: ScoredText, position: int) -> Row:
        row = _row(text, position, config, opened)
        return replace(row, columns=row.columns | _plain_context(text, position, config, opened))

    rows = PositionRows(train, kept, make), PositionRows(held_out, evaluated, make_held_out)
    return Task("next_token_reasoning", *rows, counters)


def scored_sides(
    config: Config, seed: int, malformed: MalformedRows, proxy: ProxyModel
) -> tuple[list[ScoredText], list[ScoredText]]:
    """The text to train on and the held-out text, with the proxy's scores.

    Raises:
        DataError, ValueError: see `load`.
    """
    train, held_out = _documents(config, seed, malformed)
    parts = [part for document in train for part in parts_of(document, config.document_tokens, proxy)]
    own = [part for document in held_out for part in parts_of(document, config.document_tokens, proxy)]
    texts = _scored([*parts, *own], config, proxy)
    sides = [True] * len(own)
    sides = [False] * len(parts) + sides if own else held_out_parts(parts, config.held_out_share, seed)
    found: tuple[list[ScoredText], list[ScoredText]] = [], []
    for text, is_held_out in zip(texts, sides, strict=True):
        found[is_held_out].append(text)
    return found


def _documents(config: Config, seed: int, malformed: MalformedRows) -> tuple[list[RawText], list[RawText]]:
    """Documents to train on, and those for evaluation if they are given apart."""
    source = Source(config.subset, config.split, config.columns, config.separator, config.max_documents)
    if config.task is not None:
        options = {key: value for key, value in config.task.items() if key != "name"}
        name = config.task["name"]
        task = open_task(name, TASKS.function(name), checked_options(TASKS, name, options), seed, malformed)
        train, held_out = (source.of_rows(rows, config.task_rows, malformed) for rows in (task.train, task.held_out))
        return train, held_out
    assert config.path is not None, "the options have either a path or a task"
    own = [] if config.held_out_path is None else source.read(config.held_out_path, malformed)
    return source.read(config.path, malformed), own


def _scored(parts: Sequence[Part], config: Config, proxy: ProxyModel) -> list[ScoredText]:
    scores = proxy.scores([part.ids for part in parts], config.scores_file)
    ends = list(accumulate(len(part.ids) for part in parts))
    return [
        ScoredText(f"{part.document.id}/{i}", part.text, part.ids, part.ends, part.start, scores.part(begin, end))
        for i, (part, begin, end) in enumerate(zip(parts, [0, *ends][: len(ends)], ends, strict=True))
    ]


def _row(text: ScoredText, position: int, config: Config, proxy: ProxyModel) -> Row:
    """The problem of one position, with the columns that rewards need."""
    asked, scores = PREDICT[config.predict](text, position, config), text.scores
    likely = {
        name: float(prob)
        for id_, prob in zip(scores.top_ids[position].tolist(), scores.top_probs[position], strict=True)
        if "\ufffd" not in (name := proxy.token_text(id_))  # a part of a character
    }
    columns = {"boundaries": asked.boundaries, "token_entropy": float(scores.entropies[position]), "likely": likely}
    if config.predict == "next_token":
        columns["plain_logprob"] = float(scores.logprobs[position : position + asked.tokens].sum())
    prompt = fill(config.prompt_template, {"context": asked.shown})
    return Row(f"next_token_reasoning/{text.id}/{position}", prompt, asked.answer, columns)


class Asked(NamedTuple):
    """A position as a problem."""

    shown: str
    """The text that the prompt shows."""
    answer: str
    boundaries: list[int]
    """Number of the answer's bytes up to the end of each of its tokens."""
    tokens: int
    """Number of tokens of the answer."""


def _next_token(text: ScoredText, position: int, config: Config) -> Asked:
    begin, limit = text.ends[position - 1], position + config.continuation_tokens
    places = [i for i in range(position, len(text.ids)) if text.ends[i] > begin]
    kept = [i for i in places if i < limit] or places[:1]  # a single character may be more tokens than the limit
    answer = text.text[begin : text.ends[kept[-1]]]
    boundaries = [len(text.text[begin : text.ends[i]].encode()) for i in kept]
    return Asked(text.text[:begin], answer, boundaries, kept[-1] + 1 - position)


def _masked_span(text: ScoredText, position: int, config: Config) -> Asked:
    begin, last = text.ends[position - 1], min(position + config.span_tokens, len(text.ids)) - 1
    stop = next(i for i in range(last, len(text.ids)) if text.ends[i] > begin)
    answer = text.text[begin : text.ends[stop]]
    shown = f"{text.text[:begin]}{MASK}{text.text[text.ends[stop] :]}"
    return Asked(shown, answer, [len(answer.encode())], stop + 1 - position)


PREDICT: dict[str, Callable[[ScoredText, int, Config], Asked]] = {
    "next_token": _next_token,
    "masked_span": _masked_span,
}


def _plain_context(text: ScoredText, position: int, config: Config, proxy: ProxyModel) -> dict[str, Any]:
    """For evaluation without thinking: the tokens before the position, and the next one."""
    if config.predict != "next_token":
        return {}
    return {"context_ids": [*proxy.prefix, *text.ids[:position]], "next_id": text.ids[position]}
