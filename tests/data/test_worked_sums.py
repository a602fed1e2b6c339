"""Worked sums: columns and answers agree, errors have the configured frequency, held-out problems stay out."""

import random
import re
from collections.abc import Callable

import pytest

from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import worked_sums
from llmquest_rl.data.datasets.worked_sums import Config, reply
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.tasks import arithmetic
from llmquest_rl.data.tokenizer import Tokenizer, prompt_renderer

CORRECT = Config(direct_share=0.0, error_rate=0.0)


def test_a_worked_reply_is_what_a_person_would_write() -> None:
    assert reply("345", "278", random.Random(0), CORRECT) == "5+8=13;4+7+1=12;3+2+1=6;#623"
    assert reply("999", "999", random.Random(0), CORRECT) == "9+9=18;9+9+1=19;9+9+1=19;#1998"
    assert reply("345", "278", random.Random(0), Config(direct_share=1.0)) == "#623"


@pytest.mark.parametrize("seed", range(50))
def test_the_answer_follows_from_the_columns(seed: int) -> None:
    """Every column is consistent with the carry before it, and the answer with the columns, also after an error."""
    rng = random.Random(seed)
    left, right = (str(rng.randint(100, 999)) for _ in range(2))
    text = reply(left, right, rng, Config(direct_share=0.0, error_rate=0.3))
    columns = re.findall(r"(\d)\+(\d)(\+1)?=(\d+);", text)
    assert [(a, b) for a, b, _, _ in columns] == list(zip(reversed(left), reversed(right), strict=True))
    totals = [int(total) for *_, total in columns]
    assert [bool(carry) for *_, carry, _ in columns] == [False, *(total > 9 for total in totals[:-1])]
    digits = "".join(str(total % 10) for total in reversed(totals))
    assert text.endswith(f"#{'1' if totals[-1] > 9 else ''}{digits}")


@pytest.mark.parametrize("seed", range(20))
def test_doubt_marks_the_wrong_columns_and_no_other(seed: int) -> None:
    config = Config(direct_share=0.0, error_rate=0.5, doubt=1.0)
    columns = re.findall(r"(\d)\+(\d)(\+1)?=(\d+)(\??);", reply("345", "278", random.Random(seed), config))
    assert len(columns) == 3
    for a, b, carry, total, mark in columns:
        assert bool(mark) == (int(total) != int(a) + int(b) + bool(carry))


def test_errors_and_pauses_come_as_often_as_asked_for() -> None:
    config = Config(direct_share=0.25, error_rate=0.1, pause=0.5, pause_after_error=0.8)
    replies = [reply("123", "456", random.Random(i), config) for i in range(4000)]
    worked = [text for text in replies if ";" in text]
    wrong = [text for text in worked if not text.endswith("#579")]
    assert len(worked) / len(replies) == pytest.approx(0.75, abs=0.03)
    assert len(wrong) / len(worked) == pytest.approx(1 - 0.9**3, abs=0.03)
    right = [text for text in worked if text.endswith("#579")]
    assert sum(text.count(".") for text in right) / len(right) == pytest.approx(1.0, abs=0.1)
    assert sum(text.count(".") for text in wrong) / len(wrong) == pytest.approx(4.0, abs=0.5)


def test_held_out_problems_are_the_tasks_and_are_not_trained_on(
    context: Callable[..., DatasetContext], tokenizer: Tokenizer
) -> None:
    renderer = prompt_renderer(tokenizer, chat_template="none")
    data = worked_sums.load(Config(rows=300, held_out=20), context(texts=renderer))
    options = arithmetic.Config(digits=3, template="{question}=", held_out=20)
    held_out = arithmetic.load(options, 0, MalformedRows("error")).held_out
    expected = {str(held_out.row(i).prompt) for i in range(20)}
    asked = {renderer.decode(group.prompt) for group in data.validation}
    assert asked == expected
    assert len(data.train) == 300 and not asked & {renderer.decode(group.prompt) for group in data.train}
