"""Metrics on right and wrong completions, computed from graded groups."""

from llmquest_rl.types import Completion, Group, Problem, Score
from trainer.sources.eval_metrics import lengths_by_outcome


def graded(*pairs: tuple[int, float | None]) -> Group:
    """Completions of these lengths and scores; None = ungraded."""
    completions = [Completion([5] * length, [-1.0] * length, "", "stop", 0) for length, _ in pairs]
    scores = [
        Score(None, failure="timeout") if value is None else Score(value, {"number": value}) for _, value in pairs
    ]
    return Group(Problem("s", "", [1], "7"), completions, scores)


def test_lengths_of_right_and_wrong_completions() -> None:
    groups = [graded((4, 1.0), (10, 0.0), (99, None)), graded((6, 1.0), (20, 0.5))]
    assert lengths_by_outcome(groups, "number", 1.0) == {"rollout/right_tokens": 5.0, "rollout/wrong_tokens": 15.0}
    assert lengths_by_outcome(groups, "number", 0.5)["rollout/wrong_tokens"] == 10.0
    assert lengths_by_outcome([graded((4, 1.0))], "number", 1.0) == {"rollout/right_tokens": 4.0}
    assert lengths_by_outcome([graded((4, None))], "number", 1.0) == {}
