"""Metrics of next-token reasoning on held-out positions: by difficulty, and beside the model's own argmax.

Difficulty is the entropy of the proxy's prediction, and the positions of `hard` are among those of `easy` (RPT, arXiv
2506.08007, section 4.1).
"""

from collections.abc import Callable, Sequence
from itertools import compress
from statistics import fmean

from llmquest_rl.data.positions import DIFFICULTIES
from llmquest_rl.types import Completion, Group, Problem, Request, Sampling
from trainer.sources.intervals import accuracy

ACCURACY = {"easy": "eval/accuracy_easy", "medium": "eval/accuracy_medium", "hard": "eval/accuracy_hard"}
ARGMAX = {"easy": "eval/argmax_easy", "medium": "eval/argmax_medium", "hard": "eval/argmax_hard"}
POSITIONS = {"easy": "eval/positions_easy", "medium": "eval/positions_medium", "hard": "eval/positions_hard"}

Generate = Callable[[Sequence[Request], Sampling], list[list[Completion]]]


def _by_difficulty(problems: Sequence[Problem]) -> dict[str, list[bool]]:
    """Whether each problem has a difficulty, by the name of the difficulty."""
    entropies = [problem.columns["token_entropy"] for problem in problems]
    return {name: [entropy > threshold for entropy in entropies] for name, threshold in DIFFICULTIES.items()}


def difficulty_metrics(groups: Sequence[Group], outcomes: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Accuracy by difficulty, and the tokens spent for each hit; empty for problems of other tasks.

    Args:
        groups: One for each problem.
        outcomes: Right or wrong for each scored completion of each group.
    """
    if not all("token_entropy" in group.problem.columns for group in groups):
        return {}
    metrics: dict[str, float] = {}
    for name, chosen in _by_difficulty([group.problem for group in groups]).items():
        known = [samples for samples in compress(outcomes, chosen) if samples]
        metrics[POSITIONS[name]] = float(len(known))
        if known:
            metrics[ACCURACY[name]] = accuracy(known).value
    hits = sum(map(sum, outcomes))
    spent = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return metrics | ({"eval/tokens_per_hit": spent / hits} if hits else {})


def argmax_metrics(problems: Sequence[Problem], generate: Generate) -> dict[str, float]:
    """Share of the positions at which the model's most likely next token, without thinking, is the true one.

    Args:
        problems: Held-out problems; those without the columns `context_ids` and `next_id` are of other tasks.
        generate: Samples with the engine.
    """
    asked = [problem for problem in problems if "next_id" in problem.columns]
    if not asked:
        return {}
    requests = [Request(problem.columns["context_ids"], 1, 0) for problem in asked]
    answers = generate(requests, Sampling(temperature=0.0, max_tokens=1))
    hits = [
        answer.token_ids[0] == problem.columns["next_id"] for problem, (answer,) in zip(asked, answers, strict=True)
    ]
    metrics = {"eval/argmax": fmean(hits)}
    for name, chosen in _by_difficulty(asked).items():
        if any(chosen):
            metrics[ARGMAX[name]] = fmean(compress(hits, chosen))
    return metrics
