"""Combines several scores of one completion: those of a grader's rewards, and those of graders and reward models."""

from collections.abc import Sequence

from llmquest_rl.types import Score


def combined(scores: Sequence[Score]) -> Score:
    """The sum of the values, with the parts and the seconds of all scores.

    If a score failed, the result is a failure of the first one's kind, because a sum without one of its terms would be
    a different reward. If no reward applies, the result has no value.
    """
    parts = {name: value for score in scores for name, value in score.parts.items()}
    seconds = sum(score.seconds for score in scores)
    failed = [score for score in scores if score.failure is not None]
    if failed:
        return Score(None, parts, failed[0].failure, "; ".join(score.detail for score in failed), seconds)
    values = [score.value for score in scores if score.value is not None]
    return Score(sum(values) if values else None, parts, None, "", seconds)
