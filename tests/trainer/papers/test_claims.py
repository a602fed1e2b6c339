"""Claims checked on numbers made by hand."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.papers.claims import Claim, check
from trainer.papers.series import Results, points, smooth, window_mean, with_cumulative_sums

CLAIM: TypeAdapter[Any] = TypeAdapter(Claim)


def results(**arms: list[list[float]]) -> Results:
    """Arm to the values of each seed, one a step."""
    return {
        arm: {
            seed: [{"step": i, "score": value} for i, value in enumerate(values)] for seed, values in enumerate(seeds)
        }
        for arm, seeds in arms.items()
    }


def holds(data: Results, **claim: Any) -> bool:
    return check(CLAIM.validate_python({"says": "so", "metric": "score", **claim}), data).holds


FLAT, RISING, HIGH = [0.1] * 10, [0.1 * i for i in range(10)], [0.5] * 10


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({"kind": "rises", "arm": "rising", "by": 0.8}, True),
        ({"kind": "rises", "arm": "rising", "by": 0.9}, False),
        ({"kind": "rises", "arm": "mixed", "by": 0.1}, False),
        ({"kind": "falls", "arm": "falling", "by": 0.8}, True),
        ({"kind": "falls", "arm": "falling", "by": 0.9}, False),
        ({"kind": "falls", "arm": "rising", "by": 0.0}, False),
        ({"kind": "falls", "arm": "rising", "by": -0.9}, True),
        ({"kind": "falls", "arm": "rising", "by": -0.8}, False),
        ({"kind": "stays", "arm": "rising", "within": 0.9}, True),
        ({"kind": "stays", "arm": "rising", "within": 0.8}, False),
        ({"kind": "stays", "arm": "falling", "within": 0.8}, False),
        ({"kind": "stays", "arm": "flat", "within": 0.0}, True),
        ({"kind": "above", "arm": "high", "than": "flat"}, True),
        ({"kind": "above", "arm": "flat", "than": "high"}, False),
        ({"kind": "above", "arm": "mixed", "than": "flat"}, False),
        ({"kind": "above", "arm": "high", "than": "flat", "times": 4.9}, True),
        ({"kind": "above", "arm": "high", "than": "flat", "times": 5.1}, False),
        ({"kind": "above", "arm": "high", "than": "flat", "by": 0.41}, False),
        ({"kind": "close", "arm": "high", "than": "flat", "within": 0.41}, True),
        ({"kind": "close", "arm": "high", "than": "flat", "within": 0.39}, False),
        ({"kind": "inside", "arm": "high", "low": 0.4, "high": 0.6}, True),
        ({"kind": "inside", "arm": "high", "high": 0.4}, False),
        ({"kind": "inside", "arm": "rising", "over": [0.0, 0.1], "high": 0.1}, True),
    ],
)
def test_a_claim_is_decided_seed_by_seed(claim: dict[str, Any], expected: bool) -> None:
    data = results(flat=[FLAT] * 3, rising=[RISING] * 3, high=[HIGH] * 3, mixed=[RISING, FLAT, HIGH])
    data |= results(falling=[RISING[::-1]] * 3)
    assert holds(data, **claim) is expected


def test_the_verdict_shows_mean_and_range() -> None:
    data = results(one=[[1.0], [2.0], [3.0]], other=[[0.5], [0.6], [0.7]])
    claim = {"says": "one is larger", "kind": "above", "arm": "one", "than": "other", "metric": "score"}
    verdict = check(CLAIM.validate_python(claim), data)
    assert "one 2 [1, 3] above other 0.6 [0.5, 0.7]" in verdict.numbers and "1 in 20" in verdict.numbers
    reverse = check(CLAIM.validate_python({**claim, "arm": "other", "than": "one"}), data)
    assert not reverse.holds and "every seed the other way round, 1 in 20" in reverse.numbers
    overlapping = check(CLAIM.validate_python(claim), results(one=[[1.0], [2.0]], other=[[0.5], [1.5]]))
    assert not overlapping.holds and overlapping.numbers.endswith("seeds overlap")


@pytest.mark.parametrize("kind", ["rises", "above", "inside"])
def test_a_number_that_is_none_holds_nothing(kind: str) -> None:
    """Infinity minus infinity, in one seed of two."""
    infinite = [float("inf")] * 10
    claims = {"rises": {"by": 0.5}, "above": {"than": "flat"}, "inside": {"low": 0.0}}
    data = results(one=[RISING, infinite] if kind == "rises" else [HIGH, HIGH], flat=[FLAT, infinite])
    if kind == "inside":
        data = results(one=[HIGH, [-float("inf")] * 10])
    assert not holds(data, kind=kind, arm="one", **claims[kind])


@pytest.mark.parametrize(
    "claim",
    [
        {"kind": "inside"},
        {"kind": "inside", "low": 0.5, "high": 0.4},
        {"kind": "close", "than": "other", "within": -0.1},
        {"kind": "rises", "by": 0.1, "over": [0.9, 0.1]},
        {"kind": "rises", "by": 0.1, "start": [2.0, 3.0]},
    ],
)
def test_a_claim_that_says_nothing_is_refused(claim: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CLAIM.validate_python({"says": "so", "metric": "score", "arm": "one", **claim})


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody"):
        holds(results(one=[HIGH]), kind="inside", arm="nobody", low=0.0)
    with pytest.raises(ValueError, match="missing has no value"):
        holds(results(one=[HIGH]), kind="inside", arm="one", metric="missing", low=0.0)


def test_a_window_mean_takes_its_part_of_the_run() -> None:
    rows = [{"step": i, "a": float(i), "sparse": float(i) if i % 5 == 0 else None} for i in range(11)]
    assert window_mean(rows, "a", (0.8, 1.0)) == 9.0
    assert window_mean(rows, "sparse", (0.0, 0.5)) == 2.5
    assert points(rows, "sparse") == [(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)]
    assert window_mean([{"step": 0, "a": 1.0}, {"step": 1, "a": float("inf")}], "a", (0.0, 1.0)) == float("inf")
    assert smooth([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]
    summed = with_cumulative_sums(
        [{"step": 0}, {"step": 1, "rollout/tokens": 10.0}, {"step": 2, "rollout/tokens": 5.0}]
    )
    assert [row["generated tokens"] for row in summed] == [0.0, 10.0, 15.0]
