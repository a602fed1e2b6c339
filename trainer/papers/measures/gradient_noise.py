"""Noise of the policy gradient by algorithm and group size, at one policy and a fixed number of completions.

The noise of a batch's gradient g is tr Cov(g) / |E g|^2, the reciprocal of a signal-to-noise ratio: the number of
batches that must be averaged until signal and noise are equal. It does not depend on the scale of the advantages.
Numerator and denominator are estimated from the same batches, and the bias of the squared mean is subtracted
(McCandlish et al. 2018, arXiv:1812.06162, A.1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmquest_rl.algorithms.presets import Algorithm, resolve
from llmquest_rl.algorithms.sequence_groups import make_sequence_groups
from llmquest_rl.batch import collate
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.types import Group
from trainer.inference import live_rollouts
from trainer.papers.measures import Trained
from trainer.papers.series import Rows

SIZES = (2, 4, 8, 16)
"""Group sizes: completions of each prompt."""
COMPLETIONS = 64
"""Completions in a batch, for every group size."""
BATCHES = 32
AGGREGATION = {"aggregation": "sequence_sum", "beta": 0.0}
"""Settings shared by all algorithms, so that only their baselines differ."""
ALGORITHMS: dict[str, tuple[Algorithm, float]] = {
    "no baseline, rewards 0 and 1": (resolve("reinforce", AGGREGATION), 0.0),
    "no baseline, rewards -1/2 and 1/2": (resolve("reinforce", AGGREGATION), -0.5),
    "rloo baseline": (resolve("rloo", AGGREGATION), 0.0),
    "grpo baseline": (resolve("grpo", AGGREGATION), 0.0),
}
"""Algorithm by label, with a constant that is added to every reward. A baseline from the group removes it."""


def labels(arms: Iterable[str]) -> set[str]:
    """Labels of the rows that `measure` returns."""
    return set(ALGORITHMS)


def measure(trained: Trained) -> dict[str, Rows]:
    """Rows with `group size` and `gradient noise`, by algorithm."""
    config = next(iter(trained.configs.values()))
    model = load_model(trained.start, torch.float32)
    rows: dict[str, Rows] = {name: [] for name in ALGORITHMS}
    with live_rollouts(config) as live:
        for step, size in enumerate(SIZES):
            groups = []
            for number in range(BATCHES):
                problems = live.components.prompts.take(COMPLETIONS // size)
                groups.append(live.rollouts.run(problems, size, config.rollout.sampling, f"{size}/{number}")[0])
            for name, (algorithm, added) in ALGORITHMS.items():
                shifted = [[_shifted(group, added) for group in batch] for batch in groups]
                noise = gradient_noise(model, shifted, algorithm, config.rollout.sampling.max_tokens)
                rows[name].append({"step": step, "group size": size, "gradient noise": noise})
    return rows


def _shifted(group: Group, added: float) -> Group:
    """The group with `added` added to every reward."""
    scores = [score if score.value is None else replace(score, value=score.value + added) for score in group.scores]
    return replace(group, scores=scores)


def gradient_noise(model: CausalLM, batches: Sequence[Sequence[Group]], algorithm: Algorithm, max_tokens: int) -> float:
    """tr Cov(g) / |E g|^2 over the gradients of the batches; infinite if the estimated signal is not positive."""
    total = square = torch.zeros(())
    for groups in batches:
        gradient = _gradient(model, groups, algorithm, max_tokens)
        total, square = total + gradient, square + gradient.square().sum()
    count = len(batches)
    mean_square = (total / count).square().sum()
    noise = (square / count - mean_square) * count / (count - 1)
    signal = mean_square - noise / count
    return float(noise / signal) if signal > 0 else float("inf")


def _gradient(model: CausalLM, groups: Sequence[Group], algorithm: Algorithm, max_tokens: int) -> Tensor:
    """Gradient of one batch as a flat float64 vector `[parameters]`."""
    objective = Policy(algorithm, 1.0, max_tokens, entropy=False)
    sequence_groups = objective.assign_token_weights(make_sequence_groups(groups, algorithm, max_tokens)[0])
    model.zero_grad()
    objective.loss(model, collate(sequence_groups)).value.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
