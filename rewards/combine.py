"""Several scores of one completion made into one: of the rewards of a grader, and of graders and reward models."""

from collections.abc import Sequence

from llmquest_rl.types import Score


def combined(scores: Sequence[Score]) -> Score:
    """The sum of the values that there are, with the parts and the seconds of all.

    One failure makes the whole a failure, of the first one's kind: a sum without one of its terms would be another
    reward. If nothing applies, there is no value.
    """
    parts = {name: value for score in scores for name, value in score.parts.items()}
    seconds = sum(score.seconds for score in scores)
    failed = [score for score in scores if score.failure is not None]
    if failed:
        return Score(None, parts, failed[0].failure, "; ".join(score.detail for score in failed), seconds)
    values = [score.value for score in scores if score.value is not None]
    return Score(sum(values) if values else None, parts, None, "", seconds)
