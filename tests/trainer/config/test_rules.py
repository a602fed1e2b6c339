"""A rule is checked where it applies, and only there."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.config.load import ConfigError, parse_config
from trainer.config.rules import RULES

ROLLOUTS: dict[str, Any] = {
    "name": "rules",
    "steps": 4,
    "cluster": "inline",
    "data": {"task": {"name": "arithmetic"}},
    "rewards": [{"name": "exact_number"}],
}
DATA_SET: dict[str, Any] = {
    "name": "rules",
    "steps": 4,
    "cluster": "inline",
    "objective": {"name": "next_token"},
    "data": {"dataset": {"name": "text", "path": "a.txt"}},
}


def broken(values: dict[str, Any]) -> list[str]:
    """Keys of the rules that a configuration breaks."""
    try:
        parse_config(values)
    except ConfigError as error:
        return [problem.split(": ")[1] for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"batch": {"samples_per_prompt": 1}}, "batch.samples_per_prompt"),
        ({"algorithm": {"beta": 0.1, "kl": "k1"}}, "algorithm.kl"),
        ({"rollout": {"sampling": {"temperature": 0}}}, "rollout.sampling.temperature"),
    ],
)
def test_a_rule_on_rollouts_is_not_checked_for_a_data_set(section: dict[str, Any], key: str) -> None:
    assert broken({**ROLLOUTS, **section}) == [key]
    assert broken({**DATA_SET, **section}) == []


def test_each_source_needs_its_own_data() -> None:
    assert broken(ROLLOUTS) == broken(DATA_SET) == []
    assert broken({**ROLLOUTS, "data": DATA_SET["data"]}) == ["data.task"]
    assert broken({**DATA_SET, "data": ROLLOUTS["data"]}) == ["data.dataset"]


def test_every_rule_says_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every rule were checked for every source, valid configurations would be refused."""
    assert {rule.applies_to for rule in RULES} == {"rollout", "dataset", "any"}
    monkeypatch.setattr("trainer.config.rules.RULES", [replace(rule, applies_to="any") for rule in RULES])
    assert broken(DATA_SET) == ["data.task", "rewards"]
    assert broken(ROLLOUTS) == ["data.dataset"]


def test_a_microbatch_may_be_exactly_as_long_as_the_longest_sequence() -> None:
    lengths = {"data": {**ROLLOUTS["data"], "max_prompt_tokens": 100}, "rollout": {"sampling": {"max_tokens": 50}}}
    assert broken({**ROLLOUTS, **lengths, "batch": {"tokens_per_microbatch": 150}}) == []
    assert broken({**ROLLOUTS, **lengths, "batch": {"tokens_per_microbatch": 149}}) == ["batch.tokens_per_microbatch"]
