"""Grading a file: rows in order, bad lines counted, nothing half-written."""

import json
from pathlib import Path

import pytest

from rewards.config import GraderConfig, RewardConfig
from rewards.grade_file import grade_file
from rewards.load import RewardError

LINES = [
    json.dumps({"completion": "18", "answer": "18"}),
    "not json",
    json.dumps({"completion": "17", "answer": "18", "extra": [1, 2]}),
    "",
    json.dumps({"answer": "18"}),
    json.dumps(["a list"]),
    json.dumps({"completion": "18", "answer": "no gold"}),
    json.dumps({"completion": "it is 18", "answer": 18}),
    '{"completion": "\\ud800", "answer": "18"}',
]


def test_rows_come_back_in_order_with_their_failures(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes("\n".join(LINES).encode() + b"\n\xff\xfe\n")
    rewards = [RewardConfig(name="exact_number"), RewardConfig(name="length", weight=0.0, max=4, cache=4)]
    summary = grade_file(rewards, source, out, GraderConfig(processes=1))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert [row["score"] for row in rows] == [1.0, None, 0.0, None, None, None, 1.0, 0.0, None]
    failures = [None, "invalid", None, "invalid", "invalid", "exception", None, None, "invalid"]
    assert [row["failure"] for row in rows] == failures
    assert rows[0]["scores"] == {"exact_number": 1.0, "length": -0.5} and rows[0]["seconds"] > 0
    assert "not JSON" in rows[1]["detail"] and "the key `completion` must be a text" in rows[3]["detail"]
    assert "not one number" in rows[5]["detail"]
    assert (summary.rows, summary.scored, summary.mean) == (9, 4, 0.5)
    assert summary.failures == {"invalid": 4, "exception": 1} and summary.not_applicable == 0
    text = str(summary)
    for shown in ("9 rows", "mean 0.5000 of 4", "length: mean", "failed, invalid: 4, e.g. line 2: not JSON"):
        assert shown in text
    assert sorted(tmp_path.iterdir()) == sorted([source, out])


def test_a_missing_column_is_an_error_before_anything_is_graded(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"completion": "1", "level": 2}\n')
    (tmp_path / "mine.py").write_text("def judge(completion, difficulty):\n    return 1")
    with pytest.raises(RewardError, match="`judge` needs `difficulty`, but the columns are: answer, completion, level"):
        grade_file([RewardConfig(function=f"{tmp_path}/mine.py:judge")], source, out)
    assert not out.exists()


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n")
    summary = grade_file([RewardConfig(name="exact_number")], source, out, GraderConfig(processes=1))
    assert summary.rows == 0 and summary.mean is None and out.read_text() == "" and "mean none" in str(summary)
    with pytest.raises(FileNotFoundError):
        grade_file([RewardConfig(name="exact_number")], tmp_path / "missing.jsonl", out)
