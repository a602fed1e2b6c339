"""From graded groups to what is trained on: advantages by group, and a weight for every token."""

from collections.abc import Sequence
from itertools import chain

import torch

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import Atom
from llmquest_rl.metrics import Metrics
from llmquest_rl.types import Group


def make_atoms(groups: Sequence[Group], algorithm: Algorithm) -> tuple[list[Atom], Metrics]:
    """One atom for each group, with streams `advantages` and `rollout_logprobs`; `token_weights` adds `weights`.

    Unscored samples and empty completions are in neither the baseline nor the loss. A group with fewer than two samples
    left, or with equal rewards, has advantages of zero; one with none left gives no atom.

    Args:
        groups: samples with completions and scores.
        algorithm: which advantage.

    Returns:
        The atoms, and metrics on rewards and lengths.
    """
    atoms = [atom for group in groups if (atom := _group_atom(group, algorithm)) is not None]
    return atoms, _group_metrics(groups)


def token_weights(atoms: Sequence[Atom], algorithm: Algorithm, max_tokens: int) -> list[Atom]:
    """The same atoms with stream `weights`. Give it all atoms of one optimizer update, over all processes."""
    lengths = [len(completion) for atom in atoms for completion in atom.completions]
    weights = iter(AGGREGATIONS[algorithm.aggregation](lengths, max_tokens) if lengths else [])
    return [
        atom.with_stream("weights", [[next(weights)] * len(completion) for completion in atom.completions])
        for atom in atoms
    ]


def group_advantages(rewards: Sequence[float | None], algorithm: Algorithm) -> list[float | None]:
    """Advantage of each sample of one group; None for unscored ones, 0 where there is nothing to compare with."""
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2 or min(scored) == max(scored):
        return [None if reward is None else 0.0 for reward in rewards]
    values = iter(ADVANTAGES[algorithm.advantage](torch.tensor(scored, dtype=torch.float64)).tolist())
    return [None if reward is None else next(values) for reward in rewards]


def _group_atom(group: Group, algorithm: Algorithm) -> Atom | None:
    pairs = zip(group.completions, group.scores, strict=True)
    rewards = [score.value if completion.token_ids else None for completion, score in pairs]
    kept = [
        (completion, advantage)
        for completion, advantage in zip(group.completions, group_advantages(rewards, algorithm), strict=True)
        if advantage is not None
    ]
    if not kept:
        return None
    return Atom(
        prompt=group.sample.prompt_ids,
        completions=[completion.token_ids for completion, _ in kept],
        streams={
            "advantages": [[advantage] * len(completion.token_ids) for completion, advantage in kept],
            "rollout_logprobs": [completion.logprobs for completion, _ in kept],
        },
    )


def _std(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0


def _group_metrics(groups: Sequence[Group]) -> Metrics:
    metrics = Metrics()
    rewards = [[score.value for score in group.scores if score.value is not None] for group in groups]
    scored = list(chain.from_iterable(rewards))
    samples = sum(len(group.scores) for group in groups)
    metrics.mean("reward/mean", sum(scored), len(scored))
    metrics.mean("reward/std", _std(scored))
    metrics.mean("reward/group_std", sum(_std(values) for values in rewards), len(rewards))
    metrics.mean("reward/uniform_group_share", sum(len(set(values)) < 2 for values in rewards), len(rewards))
    metrics.mean("reward/unscored_share", samples - len(scored), samples)
    metrics.sum("reward/scored_samples", len(scored))
    for score in chain.from_iterable(group.scores for group in groups):
        for name, part in score.parts.items():
            if part is not None:
                metrics.mean(f"reward/{name}", part)
    for completion in chain.from_iterable(group.completions for group in groups):
        metrics.mean("rollout/completion_tokens", len(completion.token_ids))
        metrics.max("rollout/completion_tokens_max", len(completion.token_ids))
        metrics.mean("rollout/truncated_share", float(completion.finish_reason == "length"))
        metrics.sum("rollout/empty_samples", float(not completion.token_ids))
    return metrics
