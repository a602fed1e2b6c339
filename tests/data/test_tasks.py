"""Tasks: the problems that they read or generate, and splits without a common question."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmquest_rl.data.rows import DataError, MalformedRows, Row
from llmquest_rl.data.task import Draw, Task, generated_task, open_task
from llmquest_rl.data.tasks import arithmetic, gsm8k, reasoning_gym, table
from llmquest_rl.options import Options


def questions(task: Task, train: int) -> tuple[set[str], set[str]]:
    assert task.held_out.size is not None
    held_out = {str(task.held_out.row(i).prompt) for i in range(task.held_out.size)}
    count = train if task.train.size is None else task.train.size
    return {str(task.train.row(i).prompt) for i in range(count)}, held_out


@pytest.mark.parametrize("seed", [0, 1])
def test_one_digit_sums_leave_both_sides_disjoint_even_when_operands_are_swapped(seed: int) -> None:
    config = arithmetic.Config(digits=1, template="{question}")
    train, held_out = questions(arithmetic.load(config, seed, MalformedRows()), 2000)
    swapped = {" + ".join(reversed(question.split(" + "))) for question in held_out}
    assert len({tuple(sorted(question.split(" + "))) for question in held_out}) == len(held_out) == 14
    assert len({tuple(sorted(question.split(" + "))) for question in train}) == 41, "every other sum is trained on"
    assert not train & (held_out | swapped)


def test_large_spaces_hold_out_what_was_asked_for_and_depend_on_the_seed() -> None:
    config = arithmetic.Config(digits=3, terms=3, operations=("+", "-", "*"), held_out=50)
    first, again, other = (arithmetic.load(config, seed, MalformedRows()) for seed in (0, 0, 1))
    assert first.held_out.size == 50
    assert questions(first, 100) == questions(again, 100)
    assert questions(first, 100) != questions(other, 100)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.data())
def test_sums_are_worked_out_like_python_does(operands: list[int], data: st.DataObject) -> None:
    operators = [data.draw(st.sampled_from("+-*")) for _ in operands[1:]]
    expression = str(operands[0]) + "".join(f"{o}{n}" for o, n in zip(operators, operands[1:], strict=True))
    assert arithmetic.evaluate(operands, operators) == eval(expression)


def test_a_space_of_one_problem_cannot_be_split() -> None:
    with pytest.raises(DataError, match="single problem"):
        generated_task("one", lambda _: Draw(Row("x", "1 + 1", "2"), "1 + 1"), held_out=4, seed=0)


def test_reasoning_gym_gives_entries_by_name_and_parameters() -> None:
    parameters = {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}
    config = reasoning_gym.Config(dataset="chain_sum", parameters=parameters, held_out=20)
    task = reasoning_gym.load(config, 0, MalformedRows())
    train, held_out = questions(task, 1500)
    row = task.train.row(1234)
    entry = row.columns["entry"]
    assert task.held_out.size == len(held_out) == 20 and not train & held_out
    assert (row.prompt, row.answer) == (entry["question"], entry["answer"])
    assert entry["metadata"]["source_dataset"] == "chain_sum"
    assert json.loads(json.dumps(entry)).keys() == entry.keys()
    assert reasoning_gym.load(config, 0, MalformedRows()).train.row(1234) == row


def test_reasoning_gym_mixes_data_sets_by_weight() -> None:
    config = reasoning_gym.Config(
        datasets=({"dataset": "chain_sum"}, {"dataset": "gcd", "weight": 3}),  # type: ignore[arg-type]
        held_out=10,
    )
    task = reasoning_gym.load(config, 0, MalformedRows())
    names = [task.train.row(i).columns["entry"]["metadata"]["source_dataset"] for i in range(200)]
    assert 0.6 < names.count("gcd") / 200 < 0.9


RARELY_DRAWN = {"dataset": "gcd", "parameters": {"n": 2}, "weight": 1e-9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sums"}, "did you mean chain_sum"),
        ({"dataset": "chain_sum", "parameters": {"terms": 2}}, "min_terms"),
        ({"dataset": "chain_sum", "parameters": {"min_terms": 9}}, "max_terms must be"),
        ({"dataset": "chain_sum", "parameters": {"seed": 1}}, "`seed` cannot be set"),
        ({"held_out": 1, "datasets": [{"dataset": "gcd"}, RARELY_DRAWN]}, "min_numbers"),
    ],
)
def test_reasoning_gym_names_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reasoning_gym.load(reasoning_gym.Config(**options), 0, MalformedRows())


def test_one_or_several_data_sets_must_be_given() -> None:
    with pytest.raises(ValidationError, match="either `dataset`"):
        reasoning_gym.Config()


MALFORMED = [
    {"prompt": "a", "answer": 1, "level": 3},
    "{'prompt': 'single quotes'}",
    "",
    "[1, 2]",
    {"prompt": "", "answer": 1},
    {"prompt": "b"},
    {"prompt": "c", "answer": 2, "level": 4},
]


def test_malformed_rows_are_dropped_and_counted_with_their_lines(jsonl: Callable[..., str]) -> None:
    path, malformed = jsonl(MALFORMED), MalformedRows("drop")
    task = table.load(table.Config(path=path, held_out_share=0.5), 0, malformed)
    assert task.counters == {"dropped_malformed_rows": 4, "dropped_overlapping_rows": 0}
    lines = [report.removeprefix(path).split(":")[1] for report in malformed.reports]
    assert lines == ["2", "4", "5", "6"]
    rows = [task.train.row(0), task.held_out.row(0)]
    assert {(row.prompt, row.answer, row.columns["level"]) for row in rows} == {("a", 1, 3), ("c", 2, 4)}


def test_a_malformed_row_stops_the_run_where_that_is_asked_for(jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON.*malformed_rows: drop"):
        table.load(table.Config(path=jsonl(MALFORMED)), 0, MalformedRows("error"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "question"}}, "no column 'question'.*it has: prompt, answer"),
        ({"template": "{prompt} {hint}"}, r"\{hint\} is none of"),
        ({"template": "{prompt} {answer}"}, "the answer is not offered"),
    ],
)
def test_a_wrong_mapping_stops_the_run_even_when_rows_may_be_dropped(
    jsonl: Callable[..., str], options: dict[str, Any], message: str
) -> None:
    path = jsonl([{"prompt": "a", "answer": "b"}] * 3)
    with pytest.raises(DataError, match=message):
        table.load(table.Config(path=path, **options), 0, MalformedRows("drop"))


def test_every_file_format_gives_the_same_rows(tmp_path: Path, jsonl: Callable[..., str]) -> None:
    rows = [{"q": f"{i} + 1?", "gold": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("q,gold\n" + "".join(f"{row['q']},{row['gold']}\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    paths = [jsonl(rows), *(str(tmp_path / f"rows.{suffix}") for suffix in ("json", "csv", "parquet"))]
    columns = table.Columns(prompt="q", answer="gold")
    tasks = [table.load(table.Config(path=path, columns=columns), 0, MalformedRows()) for path in paths]
    assert all(task == tasks[0] for task in tasks)
    assert (tasks[0].train.size, tasks[0].held_out.size) == (18, 2)


def test_a_csv_row_with_too_few_fields_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\na,1\nb\n")
    with pytest.raises(DataError, match=r"rows\.csv:3: .*2 fields"):
        table.load(table.Config(path=str(tmp_path / "rows.csv")), 0, MalformedRows())


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a readable parquet file"):
        table.load(table.Config(path=str(tmp_path / "rows.parquet")), 0, MalformedRows())


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_a_share_never_puts_a_repeated_question_on_both_sides(numbers: list[int], share: float, seed: int) -> None:
    def rows() -> list[dict[str, Any]]:
        return [{"prompt": f"q{number}", "answer": number} for number in numbers]

    if len(set(numbers)) < 2:
        with pytest.raises(DataError, match="distinct questions"):
            open_task("user:rows", rows, Options(), seed, MalformedRows())
        return
    task = open_task("user:rows", rows, Options(), seed, MalformedRows())
    train, held_out = questions(task, 0)
    assert train and held_out and not train & held_out
    assert (task.train.size or 0) + (task.held_out.size or 0) == len(numbers)


def test_gsm8k_reads_the_gold_answer_and_leaves_test_questions_out_of_training(jsonl: Callable[..., str]) -> None:
    train = jsonl([{"question": f"q{i}", "answer": f"2*{i}=...\n#### {i},000"} for i in range(5)], "train.jsonl")
    test = jsonl([{"question": "q3", "answer": "#### 3,000"}, {"question": "t", "answer": "#### -7"}], "test.jsonl")
    task = gsm8k.load(gsm8k.Config(path=train, held_out_path=test), 0, MalformedRows())
    assert [task.train.row(i).answer for i in range(4)] == ["0000", "1000", "2000", "4000"]
    assert [task.held_out.row(i).answer for i in range(2)] == ["3000", "-7"]
    assert task.counters["dropped_overlapping_rows"] == 1
    assert str(task.train.row(0).prompt).startswith("q0\n") and "\\boxed{}" in str(task.train.row(0).prompt)
    assert task.train.row(3).id == "gsm8k/train/4"


def test_gsm8k_from_a_file_alone_holds_out_a_share(jsonl: Callable[..., str]) -> None:
    path = jsonl([{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)])
    assert gsm8k.load(gsm8k.Config(path=path), 0, MalformedRows()).held_out.size == 2


def test_the_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="give the path of a .jsonl"):
        gsm8k.load(gsm8k.Config(path="nobody-here/no-such-set"), 0, MalformedRows())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file .*none.jsonl"):
        table.load(table.Config(path=str(tmp_path / "none.jsonl")), 0, MalformedRows())


class UserOptions(Options):
    count: int = 4


def test_a_user_function_gets_its_options_and_the_seed() -> None:
    def rows(count: int, seed: int) -> Any:
        for i in range(count):
            yield {"prompt": f"{seed}:{i}", "answer": i, "unit": "kg"}
        yield "no row"

    malformed = MalformedRows("drop")
    task = open_task("mine.py:rows", rows, UserOptions(count=10), 7, malformed)
    assert (task.train.size, task.held_out.size, malformed.reports) == (
        9,
        1,
        ["mine.py:rows, row 10: a row must be a dict, not str"],
    )
    assert task.held_out.row(0).columns == {"unit": "kg"}
    assert str(task.held_out.row(0).prompt).startswith("7:")


def test_a_task_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="has no rows"):
        open_task("mine:rows", lambda: [], Options(), 0, MalformedRows())
