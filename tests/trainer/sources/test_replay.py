"""Saved rollouts are replayed exactly, or an error gives the reason."""

import gzip
import math
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.types import Completion, Group, Problem, Score
from trainer.sources.replay import load_rollouts, replay_steps, save_rollouts

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.sampled_from(["$dict", "$tuple", "$x", ""])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


def group(answer: Any = "4", columns: dict[str, Any] | None = None, text: str = "4") -> Group:
    return Group(
        Problem("t/1", [{"role": "user", "content": "2+2"}], [1, 2, 3], answer, columns or {}),
        [Completion([4, 5], [-0.1, -1 / 3], text, "stop", 7), Completion([], [], "", "length", 7)],
        [Score(1.0, {"exact": 1.0, "format": None}, seconds=0.25), Score(None, {}, "timeout", "took 5 s", 5.0)],
    )


@settings(max_examples=60, deadline=None)
@given(answer=VALUES, columns=st.dictionaries(st.text(), VALUES, max_size=3), text=st.text())
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, answer: Any, columns: Any, text: str) -> None:
    folder = tmp_path_factory.mktemp("rollouts")
    groups = [group(answer, columns, text), group(answer)]
    save_rollouts(folder, 3, groups)
    loaded = load_rollouts(folder, 3)
    assert loaded == groups
    assert repr(loaded) == repr(groups)  # also tells 1 from 1.0 and True, and a list from a tuple


def test_floats_are_exact_to_the_bit(tmp_path: Path) -> None:
    values = [-0.0, 5e-324, -1 / 3, math.pi, 1.7976931348623157e308, -math.inf, math.nan]
    problem = Problem("t/1", "p", [1], None)
    completion = Completion(list(range(len(values))), values, "", "stop", 0)
    save_rollouts(tmp_path, 0, [Group(problem, [completion], [Score(0.1 + 0.2)])])
    (loaded,) = load_rollouts(tmp_path, 0)
    assert [value.hex() for value in loaded.completions[0].logprobs] == [value.hex() for value in values]
    assert loaded.scores[0].value == 0.1 + 0.2


def test_typed_columns_keep_their_types(tmp_path: Path) -> None:
    columns = {
        "when": [datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=UTC), date(2024, 1, 1), time(1, 2), timedelta(-1, 3, 7)],
        "sets": [{1, 2, (3, "x")}, frozenset({"a"}), set()],
        "number": (Fraction(1, 3), Decimal("0.10"), 1 + 2j, b"\x00\xff"),
        "line ends": "a\u2028b\x85c\r\nd\ud800",
    }
    save_rollouts(tmp_path, 1, [group(columns=columns)])
    assert load_rollouts(tmp_path, 1)[0].problem.columns == columns


def test_equal_rollouts_make_equal_files(tmp_path: Path) -> None:
    first, second = (save_rollouts(tmp_path / name, 1, [group()]) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_step_without_groups_and_the_list_of_steps(tmp_path: Path) -> None:
    for step in (11, 2, 1_234_567):
        save_rollouts(tmp_path, step, [])
    assert load_rollouts(tmp_path, 11) == []
    assert replay_steps(tmp_path) == [2, 11, 1_234_567]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_missing_step_names_those_that_exist(tmp_path: Path) -> None:
    save_rollouts(tmp_path, 2, [])
    with pytest.raises(ValueError, match=r"no rollouts of step 3; saved steps: \[2\]"):
        load_rollouts(tmp_path, 3)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"junk", lambda data: b""])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    path = save_rollouts(tmp_path, 2, [group()] * 50)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        load_rollouts(tmp_path, 2)


def test_a_file_of_another_version_says_so(tmp_path: Path) -> None:
    path = save_rollouts(tmp_path, 2, [group()])
    lines = gzip.decompress(path.read_bytes()).replace(b'"format": 2', b'"format": 1', 1)
    path.write_bytes(gzip.compress(lines))
    with pytest.raises(ValueError, match=r"another version \(format 1; this version reads 2\): sample again"):
        load_rollouts(tmp_path, 2)


def test_an_unknown_type_names_the_sample_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_rollouts(tmp_path, 2, [group()])
    before = path.read_bytes()
    with pytest.raises(TypeError, match="problem t/1 cannot be saved for replay: .* is a object"):
        save_rollouts(tmp_path, 2, [group(answer=object())])
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "uint8", "bool", "U3"])
def test_arrays_come_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 60_000, 12).astype(np.uint32)
    array = numbers.view(np.float32) if dtype == "float32" else numbers.astype(dtype)
    images = np.full((1, 3, 2, 2), -0.0, np.float32)
    problem = replace(group().problem, columns={"array": array.reshape(3, 4).T}, images=images)
    save_rollouts(tmp_path, 1, [replace(group(), problem=problem)])
    loaded = load_rollouts(tmp_path, 1)[0].problem
    assert loaded.images is not None and loaded.images.flags.writeable
    for ours, theirs in ((loaded.images, images), (loaded.columns["array"], array.reshape(3, 4).T)):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def test_an_array_of_objects_names_the_sample(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="problem t/1 cannot be saved for replay: an array of object"):
        save_rollouts(tmp_path, 2, [group(columns={"array": np.array([object()])})])
