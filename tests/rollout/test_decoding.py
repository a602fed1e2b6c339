"""The tokens and the strings that end a completion."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.decoding import Decoder, stop_index


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": [128001, 128008, 128009]}, {"eos_token_id": 128001}, {128001, 128008, 128009}),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {3}),
        ({}, {"eos_token_id": [4, 5]}, {4, 5}),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {0}),
        (None, {"eos_token_id": 7}, {7}),
        (None, {}, set()),
    ],
)
def test_end_tokens(
    generation_config: dict[str, Any] | None, config: dict[str, Any], expected: set[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert Decoder(tmp_path).eos_ids == expected


@pytest.mark.parametrize(
    ("stop", "index"), [(["c"], 2), (["d", "b"], 1), (["ab", "b"], 0), (["e"], None), (["e", "a"], 0), ([], None)]
)
def test_the_earliest_stop_string_counts_even_at_the_start(stop: list[str], index: int | None) -> None:
    assert stop_index("abcdb", stop) == index
