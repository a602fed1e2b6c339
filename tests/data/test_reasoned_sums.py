"""Sums as text and next-token questions about them: what a box holds, and what noise looks like."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from llmquest_rl.data.dataset import DatasetContext, SupervisedData
from llmquest_rl.data.datasets import reasoned_sums
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.tasks import arithmetic
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer
from rewards.builtin import next_token

Load = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def load(tokenizer: Tokenizer) -> Load:
    plain = prompt_renderer(tokenizer, chat_template="none")

    def make(**options: Any) -> list[tuple[str, str]]:
        context = DatasetContext(plain, 200, 5, MalformedRows())
        return _texts(reasoned_sums.load(reasoned_sums.Config(rows=200, held_out=10, **options), context), plain)

    return make


def _texts(data: SupervisedData, plain: PromptRenderer) -> list[tuple[str, str]]:
    eos = plain.tokenizer.eos_token
    return [
        (plain.decode(group.prompt), plain.decode(group.completions[0]).removesuffix(str(eos))) for group in data.train
    ]


def test_a_question_is_answered_with_the_next_character_after_a_thought(load: Load) -> None:
    for prompt, completion in load(direct_share=0.0, error_rate=0.0, whole_share=0.0):
        left, right, shown = re.fullmatch(r"(\d+) \+ (\d+)=(\d*)\?", prompt).groups()  # type: ignore[union-attr]
        answer = str(int(left) + int(right))
        gold = answer[len(shown) :]
        assert answer.startswith(shown) and f"#{shown}.{gold}</think>" in completion
        assert next_token.reward(completion, gold, next_token.Config(), list(range(1, len(gold) + 1))) == 1.0


def test_boxes_with_the_whole_answer_are_right_at_its_beginning_only(load: Load) -> None:
    for prompt, completion in load(direct_share=0.0, error_rate=0.0, whole_share=1.0):
        left, right, shown = re.fullmatch(r"(\d+) \+ (\d+)=(\d*)\?", prompt).groups()  # type: ignore[union-attr]
        assert completion.endswith(f"\\boxed{{{int(left) + int(right)}}}")


def test_plain_rows_are_text_and_noisy_ones_have_random_digits(load: Load) -> None:
    rows = load(direct_share=1.0, noise_digits=3, noise_share=0.5)
    noisy = [completion for _, completion in rows if ";" in completion]
    assert 60 < len(noisy) < 140
    for prompt, completion in rows:
        left, right = prompt.removesuffix("=").split(" + ")
        assert re.fullmatch(rf"{int(left) + int(right)}(;\d\d\d)?", completion)
    assert len({completion[-3:] for completion in noisy}) > 40, "unpredictable"


def test_a_noisy_sum_keeps_its_problem_and_its_split() -> None:
    plain, noisy = (arithmetic.load(arithmetic.Config(digits=3, noise_digits=n), 4, MalformedRows()) for n in (0, 2))
    for index in range(50):
        assert plain.train.row(index).prompt == noisy.train.row(index).prompt
        assert re.fullmatch(rf"{plain.train.row(index).answer};\d\d", noisy.train.row(index).answer)
    held_out = [{str(task.held_out.row(i).prompt) for i in range(task.held_out.size or 0)} for task in (plain, noisy)]
    assert held_out[0] == held_out[1]
