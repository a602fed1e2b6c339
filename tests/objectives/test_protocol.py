"""Every built-in objective has all members that the learner and the batch sources read."""

from typing import Any

import pytest
from typing_extensions import get_protocol_members

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.objectives import OBJECTIVES, Objective
from llmquest_rl.options import options_class
from llmquest_rl.types import Sampling

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"labels": ["a", "b"]}],
    "distill": [{"teacher": "folder"}, {"teacher": "folder", "source": "dataset"}],
    "preference": [{}, {"source": "rollout_pairs"}],
}
"""Options of objectives that need some, or that build several classes."""
CASES = [(name, options) for name in OBJECTIVES.names() for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_has_every_member(name: str, options: dict[str, Any]) -> None:
    config = options_class(OBJECTIVES, name)(**options)
    made = OBJECTIVES.module(name).build(config, resolve("reinforce"), Sampling())
    missing = [member for member in get_protocol_members(Objective) if not hasattr(made, member)]
    assert missing == []
