"""Data sets of labels: the input of the classifier, and the label as the target of its last token."""

from collections.abc import Callable
from typing import Any

import pytest

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import labelled
from llmquest_rl.data.rows import DataError, MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer

LABELS = ("ham", "spam")
Make = Callable[..., DatasetContext]
Write = Callable[..., str]


def load(context: DatasetContext, **options: Any) -> list[SequenceGroup]:
    """Training sequences, then those for validation."""
    data = labelled.load(labelled.Config(**options), context)
    return [*data.train, *data.validation]


def judged(group: SequenceGroup) -> tuple[list[int], int]:
    """The tokens that a model reads, and the number it should say at the last of them."""
    batch = collate([group])
    assert batch.sources.tolist() == [len(batch.tokens) - 1]
    return batch.tokens.tolist(), int(batch.targets)


def test_text_is_encoded_as_the_tokenizer_does_by_itself(context: Make, jsonl: Write, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [{"text": f"message {i}", "label": LABELS[i % 2]} for i in range(8)]
    found = [judged(group) for group in load(context(labels=LABELS), path=jsonl(rows))]
    expected = [(tokenizer.encode(row["text"]), LABELS.index(row["label"])) for row in rows]
    assert sorted(found) == sorted(expected)


def test_numbers_of_the_hub_and_other_columns(context: Make, jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = [{"sentence": f"message {i}", "class": i % 2, "text": "not this"} for i in range(8)]
    columns = {"text": "sentence", "label": "class"}
    found = [judged(group) for group in load(context(labels=LABELS), path=jsonl(rows), columns=columns)]
    assert sorted(found) == sorted((tokenizer.encode(f"message {i}"), i % 2) for i in range(8))


def test_messages_go_through_the_chat_template(context: Make, jsonl: Write, renderer: PromptRenderer) -> None:
    talks = [[{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yes?"}] for i in range(4)]
    rows: list[Any] = [{"messages": talk, "label": "spam"} for talk in talks]
    texts = sorted(renderer.decode(judged(group)[0]) for group in load(context(labels=LABELS), path=jsonl(rows)))
    assert texts == sorted(renderer.chat_text(renderer.with_system(talk), False) for talk in talks)  # type: ignore[arg-type]
    assert all("Be brief." in text for text in texts)


def test_a_text_is_on_one_side_only(context: Make, jsonl: Write) -> None:
    rows: list[Any] = [{"text": f"message {i % 10}", "label": i % 2} for i in range(40)]
    data = labelled.load(labelled.Config(path=jsonl(rows), validation_share=0.3), context(labels=LABELS))
    train, held_out = ({tuple(judged(group)[0]) for group in side} for side in (data.train, data.validation))
    assert (len(train), len(held_out)) == (7, 3)
    assert not train & held_out


def test_a_task_whose_answers_are_labels(context: Make, jsonl: Write, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [{"prompt": f"message {i}", "answer": LABELS[i % 2]} for i in range(20)]
    task = {"name": "table", "path": jsonl(rows), "held_out_share": 0.25}
    data = labelled.load(labelled.Config(task=task), context(labels=LABELS))
    assert (data.name, len(data.train), len(data.validation)) == (f"labelled/{data.name[9:]}", 15, 5)
    found = [judged(group) for group in [*data.train, *data.validation]]
    assert sorted(found) == sorted((tokenizer.encode(row["prompt"]), LABELS.index(row["answer"])) for row in rows)


GOOD: list[Any] = [{"text": f"message {i}", "label": i % 2} for i in range(6)]
BAD = [
    ({"text": "x", "label": "eggs"}, r"unknown label 'eggs': expected one of ham, spam, or a number from 0 to 1"),
    ({"text": "x", "label": 2}, "unknown label 2: expected one of ham, spam"),
    ({"text": "x", "label": -1}, "unknown label -1"),
    ({"text": "x", "label": True}, "unknown label True"),
    ({"text": "x", "label": 1.0}, "unknown label 1.0"),
    ({"text": "x", "label": ["ham"]}, r"unknown label \['ham'\]"),
    ({"text": "x", "label": None}, "the row has no label: expected one of ham, spam"),
    ({"text": "x"}, "the row has no label"),
    ({"text": " ", "label": 0}, "empty"),
    ({"text": 7, "label": 0}, "the text must be a string, not int"),
    ({"label": 0}, "either `text` or `messages`; it has: label"),
    ({"messages": "hello", "label": 0}, "must be a list of messages"),
    ({"messages": [{"role": "user"}], "label": 0}, "`role` and `content`"),
    ({"text": "x", "messages": [{"role": "user", "content": "x"}], "label": 0}, "either `text` or `messages`"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], message: str, context: Make, jsonl: Write) -> None:
    path = jsonl([*GOOD, row])
    with pytest.raises(DataError, match=f":7: .*{message}"):
        load(context(labels=LABELS), path=path)
    malformed = MalformedRows("drop")
    assert len(load(context(labels=LABELS, malformed=malformed), path=path)) == 6
    assert malformed.count == 1


def test_long_texts_are_dropped_or_an_error(context: Make, jsonl: Write) -> None:
    path = jsonl([*GOOD, {"text": "word " * 200, "label": 0}])
    data = labelled.load(labelled.Config(path=path), context(labels=LABELS))
    assert data.counters["dropped_long_rows"] == 1
    with pytest.raises(DataError, match=r":7: the row has \d+ tokens, more than batch.tokens_per_sequence = 64"):
        load(context(labels=LABELS, long_rows="error"), path=path)


def test_an_objective_without_labels_is_refused(context: Make, jsonl: Write) -> None:
    with pytest.raises(DataError, match=r"gives each sequence a label, but the objective has no labels: .*classify"):
        load(context(), path=jsonl(GOOD))
