"""The built-in rewards: each against the examples in its own file, and cases that need more than an example."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import extract
from rewards.builtin import REWARDS, exact_number, length, math_verify
from rewards.builtin import format as format_reward
from rewards.config import GraderConfig, RewardConfig
from rewards.grade_file import parse_reward
from rewards.grader import GradeItem, Grader
from rewards.load import load_reward, read_return

BUILTINS = REWARDS.names()
ROOT = Path(__file__).parents[3]
EXAMPLES = [
    pytest.param(name, *example, id=f"{name}-{number}")
    for name in BUILTINS
    for number, example in enumerate(importlib.import_module(f"rewards.builtin.{name}").EXAMPLES)
]


def test_the_rewards_of_the_documentation_are_built_in() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    table = page.partition("## Built-in rewards")[2].partition("Each is one file")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE), "the page has a table"
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == BUILTINS


@pytest.mark.parametrize(("name", "completion", "answer", "expected"), EXAMPLES)
def test_examples(name: str, completion: str, answer: Any, expected: float) -> None:
    reward = load_reward(RewardConfig(name=name))
    columns = {"entry": answer} if name == "reasoning_gym" else {}
    returned = read_return(name, reward(GradeItem("q", completion, answer, columns)))
    assert returned == {name: expected}


LOOSE_TAKES_TOO_MUCH = [
    (r"\boxed{6\times7}", "42"),
    (r"\boxed{1+1}", "2"),
    (r"\boxed{18\%}", "0.18"),
    ("no idea 1 2 3 18", "18"),
    (r"\boxed{y=5}", "5"),
    (r"\boxed{1,2}", r"\{1,2\}"),
    (r"\boxed{1,2}", "(1,2)"),
    (r"\boxed{1.41421356}", r"\sqrt{2}"),
    (r"<think>maybe \boxed{42}", "42"),
]


@pytest.mark.parametrize(("completion", "answer"), LOOSE_TAKES_TOO_MUCH)
def test_strict_refuses_what_math_verify_alone_takes(completion: str, answer: str) -> None:
    assert math_verify.reward(completion, answer, math_verify.Config(strict=False)) == 1.0
    assert math_verify.reward(completion, answer, math_verify.Config()) == 0.0


def test_an_unreadable_gold_answer_is_a_failure_and_not_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        math_verify.reward(r"\boxed{1}", "", math_verify.Config())
    with pytest.raises(ValueError, match="'about five' is not one number"):
        exact_number.reward("5", "about five", exact_number.Config())
    with pytest.raises(ValueError, match="is not one number"):
        exact_number.reward("1", True, exact_number.Config())


HOSTILE_MATHEMATICS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{10^{10^{10}}}"]


def test_hostile_mathematics_ends_at_the_time_limit_and_its_neighbours_are_scored() -> None:
    completions = [text for hostile in HOSTILE_MATHEMATICS for text in (r"\boxed{\frac{6}{4}}", hostile)]
    config = GraderConfig(processes=2, timeout_s=3.0)
    with Grader([RewardConfig(name="math_verify", strict=False)], config) as grader:
        scores = grader.grade([GradeItem("q", text, r"\frac{3}{2}") for text in completions])
    assert [(score.value, score.failure) for score in scores] == [(1.0, None), (None, "timeout")] * 2


@pytest.mark.parametrize("completion", HOSTILE_MATHEMATICS)
def test_strict_knows_without_computing_it_that_hostile_mathematics_is_no_number(completion: str) -> None:
    assert math_verify.reward(completion, "5", math_verify.Config()) == 0.0


@given(st.integers(-(10**40), 10**40), st.integers(-3, 3))
def test_exact_number_is_exact(number: int, difference: int) -> None:
    for text in (f"so it is {number}", f"<answer>{number:,}</answer>", rf"\boxed{{{number}}}", f"#### {number}"):
        expected = float(difference == 0)
        assert exact_number.reward(text, str(number + difference), exact_number.Config()) == expected


@given(st.text(max_size=60))
def test_no_text_breaks_the_parsers(text: str) -> None:
    assert exact_number.reward(text, "5", exact_number.Config()) in (0.0, 1.0)
    assert exact_number.reward(text, "5", exact_number.Config(whole=True)) in (0.0, 1.0)
    assert format_reward.reward(text, format_reward.Config()) in (0.0, 1.0)
    boxed = extract.last_boxed(text)
    assert boxed is None or f"{{{boxed}}}" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<a>1</a>", "1"), ("<a>1</a> <a> 2 </a>", "2"), ("1</a>", None), ("<a>1", None), ("</a>1<a>", None)],
)
def test_a_tag_must_be_opened_and_closed(text: str, expected: str | None) -> None:
    assert extract.last_tagged(text, "a") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("18", 1.0), (" 18\n", 1.0), ("$18", 1.0), ("18.0", 1.0), ("= 18", 0.0), ("18.", 0.0), ("18 18", 0.0), ("", 0.0)],
)
def test_the_whole_completion_is_the_number(text: str, expected: float) -> None:
    assert exact_number.reward(text, "18", exact_number.Config(whole=True)) == expected


def test_tolerance_is_absolute() -> None:
    assert exact_number.reward("3.14", "3.14159", exact_number.Config(tolerance=0.01)) == 1.0
    assert exact_number.reward("3.14", "3.14159", exact_number.Config()) == 0.0


def test_format_takes_other_tags_and_an_opened_one() -> None:
    config = format_reward.Config(tags=("plan", "code"), opened=True)
    assert format_reward.reward("a</plan><code>b</code>", config) == 1.0
    assert format_reward.reward("<plan>a</plan><code>b</code>", config) == 0.0


def test_length_counts_tokens_where_they_are_known() -> None:
    config = length.Config(max=100, cache=20)
    penalties = [length.reward("x", config, tokens) for tokens in (0, 80, 85, 100, 101)]
    assert penalties == [0.0, 0.0, -0.25, -1.0, -1.0]


def test_reasoning_gym_scores_its_own_answers_from_json() -> None:
    module = importlib.import_module("rewards.builtin.reasoning_gym")
    for name in ("chain_sum", "spell_backward", "countdown", "letter_counting", "gcd", "simple_equations"):
        entry = json.loads(json.dumps(module.reasoning_gym.create_dataset(name, size=1, seed=5)[0]))
        assert module.reward(f"<answer>{entry['answer']}</answer>", entry, module.Config(tag="answer")) == 1.0
        assert module.reward(entry["answer"], entry, module.Config(tag="answer")) == 0.0
        assert module.reward("surely wrong", entry, module.Config()) < 1.0
    with pytest.raises(ValueError, match="source_dataset"):
        module.reward("1", {"answer": "1", "question": "?"}, module.Config())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "a reward needs `name`"),
        ({"name": "exact_numbr"}, "'exact_numbr' is not the name of a reward; did you mean exact_number"),
        (
            {"name": "exact_number", "tolerence": 1},
            "`exact_number` has no option `tolerence`; did you mean tolerance",
        ),
        ({"name": "exact_number", "tolerance": "x"}, "tolerance: Input should be a valid number.*got 'x'"),
        ({"name": "exact_number", "weight": "heavy"}, "weight"),
        ({"name": "exact_number", "weight": float("inf")}, "weight"),
        ({"name": "length", "max": 5, "cache": 6}, "cannot be larger"),
        ({"function": "nowhere/mine.py:reward"}, "there is no file .*nowhere/mine.py"),
        ({"function": "module:"}, "should end in `:function`"),
        ({"name": "pool"}, "'pool' is not the name of a reward"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig.model_validate(keys)


def test_an_entry_and_its_saved_form_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def judge(factor): ...")
    monkeypatch.chdir(tmp_path)
    for config in (
        RewardConfig(name="exact_number", whole=True, weight=0.5),
        RewardConfig(name="strict", function="math_verify"),
        RewardConfig(function="mine.py:judge", factor=2),
    ):
        assert RewardConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert (config.name, config.function) == ("judge", f"{tmp_path}/mine.py:judge")


def test_a_reward_on_the_command_line() -> None:
    config = parse_reward("exact_number,whole=true,weight=0.5,name=number")
    assert (config.name, config.function, config.weight, config.options) == (
        "number",
        "exact_number",
        0.5,
        {"whole": True},
    )
    with pytest.raises(ValueError, match="has no value"):
        parse_reward("exact_number,whole")
