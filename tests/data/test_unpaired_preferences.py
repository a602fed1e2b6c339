"""Completions that are good or bad by themselves: their tokens, their sides, and the rows that are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import tokenize_row
from llmquest_rl.data.dataset import DatasetContext, SupervisedData
from llmquest_rl.data.datasets import unpaired_preferences
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import DataError, MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer
from llmquest_rl.options import Options
from tests.data.test_predicted_pairs import TRIMS, learnt, said
from tests.data.test_preferences import EOS, every_group

Load = Callable[..., SupervisedData]
ROWS: list[Any] = [{"prompt": f"{i} + 1?", "completion": str(i + 1 + i % 2), "label": i % 2 == 0} for i in range(40)]


@pytest.fixture
def load(jsonl: Callable[..., str], context: Callable[..., DatasetContext]) -> Load:
    """Loads rows from a file; the context can be changed."""

    def loaded(rows: list[Any], changes: dict[str, Any] | None = None, **options: Any) -> SupervisedData:
        config = unpaired_preferences.Config(path=jsonl(rows), **options)
        return unpaired_preferences.load(config, context(**changes or {}))

    return loaded


def sides(groups: list[SequenceGroup]) -> list[float]:
    """The side of each group, which all tokens of its completion must have."""
    found = [set(values) for group in groups for values in group.token_fields["sides"]]
    assert [list(map(len, group.token_fields["sides"])) for group in groups] == [
        list(map(len, group.completions)) for group in groups
    ]
    return [side for [side] in found]


@pytest.mark.parametrize("as_number", [False, True])
def test_a_row_is_one_completion_on_its_side(load: Load, renderer: PromptRenderer, as_number: bool) -> None:
    groups = every_group(load([row | {"label": int(row["label"])} if as_number else row for row in ROWS]))
    assert all(group.mask is None for group in groups)
    found = {
        (tuple(group.prompt), *learnt(group, renderer), side) for group, side in zip(groups, sides(groups), strict=True)
    }
    assert found == {
        (tuple(renderer.prompt_ids(row["prompt"])), f"{row['completion']}{EOS}", 1.0 if row["label"] else -1.0)
        for row in ROWS
    }


def test_strings_and_messages_give_what_fine_tuning_learns(load: Load, renderer: PromptRenderer) -> None:
    asked = [said("user", "2 + 2?"), said("assistant", "4"), said("user", "Sure?")]
    checked = [said("assistant", "Wait."), said("user", "Well?"), said("assistant", "Yes")]
    rows = [
        {"prompt": "Sure?", "completion": [said("assistant", "Yes")], "label": 1},
        {"prompt": asked, "completion": "Yes", "label": 1},
        {"prompt": asked, "completion": checked, "label": 1},
    ]
    bad: list[Any] = [{"prompt": f"{i}?", "completion": "No", "label": 0} for i in range(5)]
    groups = {len(group.prompt): group for group in every_group(load([*rows, *bad])) if sides([group]) == [1.0]}
    assert len(groups) == 3
    for row, (_, group) in zip(rows, sorted(groups.items()), strict=True):
        fine_tuned = tokenize_row(row, renderer, mask_prompt=True)
        assert group.prompt + group.completions[0] == fine_tuned.prompt + fine_tuned.completions[0]
        assert learnt(group, renderer) == [f"Yes{EOS}"] and group.mask is None, "the last reply alone is learnt"


def test_texts_without_a_template_and_other_columns(load: Load, tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    rows = [{"q": row["prompt"], "hint": "Add.", "a": row["completion"], "ok": row["label"]} for row in ROWS]
    columns = {"prompt": "q", "completion": "a", "label": "ok"}
    data = load(rows, {"texts": plain}, columns=columns, template="{hint} {prompt} =")
    texts = {plain.decode(group.prompt) + learnt(group, plain)[0] for group in every_group(data)}
    assert texts == {f"Add. {row['prompt']} ={row['completion']}{EOS}" for row in ROWS}
    with pytest.raises(DataError, match=r"no column 'better' \(columns.label\); it has: q, hint, a, ok"):
        load(rows, columns=columns | {"label": "better"})
    with pytest.raises(DataError, match=r"no column 'input' \(template\)"):
        load(rows, columns=columns, template="{input}")


def test_a_prompt_is_on_one_side_of_the_split_only(
    load: Load, jsonl: Callable[..., str], renderer: PromptRenderer
) -> None:
    rows = [row | {"prompt": f"Question {i % 10}"} for i, row in enumerate(ROWS)]
    data = load(rows, validation_share=0.3)
    train, held_out = ({renderer.decode(group.prompt) for group in side} for side in (data.train, data.validation))
    assert (len(train), len(held_out)) == (7, 3) and not train & held_out
    data = load(ROWS, validation_path=jsonl(ROWS[:4], "validation.jsonl"))
    assert (len(data.train), len(data.validation), data.counters["dropped_overlapping_rows"]) == (36, 4, 4)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a word as label": ({"label": "good"}, "the label must be true .*, not 'good'"),
    "the text of a label": ({"label": "1"}, "the label must be true .*, not '1'"),
    "another number": ({"label": 2}, "the label must be true .*, not 2"),
    "a negative number": ({"label": -1}, "the label must be true .*, not -1"),
    "a fraction": ({"label": 1.0}, "the label must be true .*, not 1.0"),
    "no label": ({"label": None}, "the row has no label"),
    "no prompt": ({"prompt": None}, "the row has no prompt"),
    "no completion": ({"completion": None}, "the row has no completion"),
    "an empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "an empty completion": ({"completion": ""}, "the completion is empty"),
    "white space": ({"completion": " \n"}, "the completion is empty"),
    "an empty message": ({"completion": [said("assistant", " ")]}, "the completion is empty"),
    "no messages": ({"completion": []}, "the completion is empty"),
    "a number": ({"completion": 4}, "neither a string nor a list of messages"),
    "unanswered": ({"completion": [said("user", "Well?")]}, "must end with the assistant's message"),
}


def assert_last_is_malformed(load: Load, row: dict[str, Any], problem: str, **changes: Any) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:41: .*{problem}"):
        load([*ROWS, row], changes)
    dropped = load([*ROWS, row], changes | {"malformed": MalformedRows("drop")})
    assert dropped.counters["dropped_malformed_rows"] == 1 and len(every_group(dropped)) == 40


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_rows_are_named_or_counted(load: Load, case: str) -> None:
    change, problem = BROKEN[case]
    assert_last_is_malformed(load, ROWS[0] | change, problem)


def test_a_completion_without_tokens_of_its_own_is_malformed(load: Load, tokenizer: Tokenizer) -> None:
    trims = prompt_renderer(tokenizer, chat_template=TRIMS)
    row = ROWS[0] | {"completion": "<think>One.</think>"}
    assert_last_is_malformed(load, row, "the tokens of a reply have no text", texts=trims)


def test_long_rows_are_dropped_or_named(load: Load) -> None:
    rows = [*ROWS, {"prompt": "Go", "completion": "long " * 200, "label": True}]
    assert load(rows).counters["dropped_long_rows"] == 1
    with pytest.raises(DataError, match=r"rows.jsonl:41: the row has \d+ tokens, more than batch.tokens_per_sequence"):
        load(rows, {"long_rows": "error"})


@pytest.mark.parametrize(("label", "missing"), [(True, "bad"), (False, "good")])
def test_rows_of_one_side_only_are_refused(
    load: Load, jsonl: Callable[..., str], context: Callable[..., DatasetContext], label: bool, missing: str
) -> None:
    alike = [row for row in ROWS if row["label"] == label]
    message = rf"the {{}} rows of data set \S+ are unusable: all their completions are .*: add {missing} completions"
    with pytest.raises(DataError, match=message.format("training")):
        load(alike)
    with pytest.raises(DataError, match=message.format("validation")):
        load(ROWS, validation_path=jsonl(alike[:3], "validation.jsonl"))
    with pytest.raises(DataError, match=message.format("training")):
        open_dataset("mine.py:rows", lambda: alike, Options(), context())


def test_a_user_function_gives_good_and_bad_completions(context: Callable[..., DatasetContext]) -> None:
    data = open_dataset("mine.py:rows", lambda: ROWS, Options(), context())
    assert sorted(sides(every_group(data))) == [-1.0] * 20 + [1.0] * 20
