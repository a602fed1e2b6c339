"""Streams: every row once an epoch, exact resume, long prompts."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.check import check_dataset, check_task
from llmquest_rl.data.dataset import SupervisedData
from llmquest_rl.data.rows import DataError, ListedRows, MalformedRows, Row
from llmquest_rl.data.stream import PromptStream, SequenceGroupStream
from llmquest_rl.data.task import Task
from llmquest_rl.data.tasks import arithmetic
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> PromptRenderer:
    return prompt_renderer(tokenizer, chat_template="none")


def listed(prompts: list[str]) -> Task:
    rows = [Row(f"t/{i}", prompt, i) for i, prompt in enumerate(prompts)]
    return Task("t", ListedRows(rows), ListedRows([Row("t/held_out/0", "held out", 0)]))


def finite(count: int) -> Task:
    return listed([f"number {i}" for i in range(count)])


def test_an_epoch_gives_every_row_once_in_a_new_order(plain: PromptRenderer) -> None:
    stream = PromptStream(finite(20), plain, seed=0)
    first, second = stream.take(20), stream.take(20)
    assert Counter(problem.id for problem in first) == Counter(problem.id for problem in second)
    assert len({problem.id for problem in first}) == 20
    assert [problem.id for problem in first] != [problem.id for problem in second]
    assert stream.metrics["data/epoch"] == 2.0
    assert [s.id for s in PromptStream(finite(20), plain, seed=1).take(20)] != [s.id for s in first]


def test_a_task_smaller_than_a_step_goes_on_with_its_next_epoch(plain: PromptRenderer) -> None:
    ids = Counter(problem.id for problem in PromptStream(finite(3), plain, seed=0).take(9))
    assert set(ids.values()) == {3}


@given(
    size=st.one_of(st.none(), st.integers(1, 12)),
    before=st.lists(st.integers(0, 7), max_size=4),
    after=st.lists(st.integers(0, 7), max_size=4),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_resumed_stream_gives_what_an_uninterrupted_one_gives(
    plain: PromptRenderer, size: int | None, before: list[int], after: list[int], seed: int
) -> None:
    def stream() -> PromptStream:
        """In finite data every third prompt is too long, so that drops are resumed as well."""
        words = [f"number {i}" + " and more words" * (i % 3 == 2) * 9 for i in range(size or 0)]
        task = arithmetic.load(arithmetic.Config(held_out=2), 0, MalformedRows()) if size is None else listed(words)
        return PromptStream(task, plain, seed, max_prompt_tokens=24)

    uninterrupted, stopped, resumed = stream(), stream(), stream()
    for n in before:
        assert uninterrupted.take(n) == stopped.take(n)
    resumed.load_state_dict(stopped.state_dict())
    for n in after:
        assert uninterrupted.take(n) == resumed.take(n)
    assert uninterrupted.counters == resumed.counters
    assert uninterrupted.state_dict() == resumed.state_dict()


def test_a_checkpoint_of_other_data_is_refused(plain: PromptRenderer) -> None:
    state = PromptStream(finite(3), plain, seed=0).state_dict()
    with pytest.raises(DataError, match="size was 3, is 4"):
        PromptStream(finite(4), plain, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0, is 1"):
        PromptStream(finite(3), plain, seed=1).load_state_dict(state)


def test_long_prompts_are_dropped_and_counted(plain: PromptRenderer) -> None:
    stream = PromptStream(listed(["short", "long " * 50, "also short"]), plain, seed=0, max_prompt_tokens=10)
    assert {problem.prompt for problem in stream.take(20)} == {"short", "also short"}
    assert stream.counters["dropped_long_prompts"] in (9, 10)


def test_a_long_prompt_is_an_error_where_that_is_asked_for(plain: PromptRenderer) -> None:
    stream = PromptStream(listed(["long " * 50]), plain, seed=0, max_prompt_tokens=10, long_prompts="error")
    with pytest.raises(DataError, match=r"t/0 has \d+ tokens, more than data.max_prompt_tokens = 10"):
        stream.take(1)


def test_only_long_prompts_end_with_an_error_and_not_with_a_hang(plain: PromptRenderer) -> None:
    stream = PromptStream(listed(["long " * 50, "longer " * 60]), plain, seed=0, max_prompt_tokens=10)
    with pytest.raises(DataError, match="raise data.max_prompt_tokens"):
        stream.take(1)
    endless = arithmetic.load(arithmetic.Config(), 0, MalformedRows())
    with pytest.raises(DataError, match="raise data.max_prompt_tokens"):
        PromptStream(endless, plain, seed=0, max_prompt_tokens=2).take(1)


def test_an_empty_task_is_an_error(plain: PromptRenderer) -> None:
    with pytest.raises(DataError, match="no training rows"):
        PromptStream(finite(0), plain, seed=0)


def test_held_out_samples_are_fixed_and_leave_the_stream_where_it_was(renderer: PromptRenderer) -> None:
    task = arithmetic.load(arithmetic.Config(held_out=30), 0, MalformedRows())
    stream, other = PromptStream(task, renderer, seed=0), PromptStream(task, renderer, seed=0)
    held_out = stream.held_out(12)
    assert len({problem.id for problem in held_out}) == 12
    assert len(stream.held_out(1000)) == 30
    other.take(5)
    assert other.held_out(12) == held_out
    stream.take(5)
    assert stream.take(5) == other.take(5)


def test_a_check_renders_rows_and_leaves_the_stream_where_it_was(renderer: PromptRenderer) -> None:
    task = arithmetic.load(arithmetic.Config(), 0, MalformedRows())
    stream, untouched = PromptStream(task, renderer, seed=0), PromptStream(task, renderer, seed=0)
    problems, check = check_task(stream)
    assert len(problems) == 10 and problems == untouched.take(10) == stream.take(10)
    assert check.lengths.shortest <= check.lengths.mean <= check.lengths.longest


def groups(count: int) -> SupervisedData:
    sequences = [SequenceGroup([], [[i, i + 1]]) for i in range(count)]
    return SupervisedData("d", sequences, sequences[:2])


@given(st.integers(1, 10), st.lists(st.integers(0, 7), max_size=4), st.integers(0, 20))
def test_a_resumed_groups_stream_gives_what_an_uninterrupted_one_gives(size: int, before: list[int], n: int) -> None:
    uninterrupted, resumed = SequenceGroupStream(groups(size), 0), SequenceGroupStream(groups(size), 0)
    state: dict[str, Any] = resumed.state_dict()
    for count in before:
        uninterrupted.take(count)
        state = uninterrupted.state_dict()
    resumed.load_state_dict(state)
    assert uninterrupted.take(n) == resumed.take(n)


def test_an_groups_stream_gives_every_sequence_once_an_epoch() -> None:
    stream = SequenceGroupStream(groups(8), 0)
    assert sorted(group.completions[0][0] for group in stream.take(8)) == list(range(8))
    assert len(stream.validation()) == 2 and len(stream.validation(1)) == 1
    assert stream.validation() == SequenceGroupStream(groups(8), 0).validation()
    before = stream.state_dict()
    assert check_dataset(stream)[1].lengths.mean == 2 and stream.state_dict() == before
    with pytest.raises(DataError, match="no training sequences"):
        SequenceGroupStream(groups(0), 0)
