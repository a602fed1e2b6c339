"""Bias and variance of the KL estimators, in value and in gradient, relative to the exact KL.

The vocabulary has a few characters, so expectations over the next token are exact sums; only the texts on which the
policies are compared are sampled. The policies lie on a line in weight space from the start model to a trained model.

Let p be the policy, q the reference and k(a) an estimator's value for token a. Gradients are taken with respect to the
logits, for which grad log p(a) = e_a - p:

* exact: sum_a p(a) log(p(a) / q(a)) grad log p(a)
* an estimator in the loss: k'(a) grad log p(a), expected over a ~ p, with k' its derivative by log p(a)
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from llmquest_rl.algorithms.kl import KL_ESTIMATORS, k3
from llmquest_rl.algorithms.ratios import bounded_exp
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import load_model
from trainer.inference import live_rollouts
from trainer.papers.measures import Trained
from trainer.papers.series import Rows
from trainer.run.trained import trained_model

STEPS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Positions on the line: 0 is the start model, 1 the trained model."""
ABSCISSA = "exact KL (nats per token)"


def _weighted_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return bounded_exp(logprobs - logprobs.detach()) * k3(logprobs, ref_logprobs)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": KL_ESTIMATORS["k1"].function,
    "k2": KL_ESTIMATORS["k2"].function,
    "k3": KL_ESTIMATORS["k3"].function,
    "k3, ratio-weighted": _weighted_k3,
}


def labels(arms: Iterable[str]) -> set[str]:
    """Labels of the rows that `measure` returns."""
    return set(ESTIMATORS)


def measure(trained: Trained) -> dict[str, Rows]:
    """Rows by estimator: the exact KL, and biases and deviations relative to the exact value or gradient."""
    arm, run = next(iter(trained.runs.items()))
    config = trained.configs[arm]
    with live_rollouts(config) as live:
        prompts = live.components.prompts.held_out(config.data.eval_size)
        groups, _ = live.rollouts.run(prompts, 1, config.rollout.sampling, "measure")
    sequence_groups = [SequenceGroup(g.problem.prompt_ids, [c.token_ids for c in g.completions]) for g in groups]
    batch = collate(sequence_groups)
    start = load_model(trained.start, torch.float32)
    end = load_model(trained_model(str(run)), torch.float32)
    reference = next_token_logprobs(start, batch)
    rows: dict[str, Rows] = {name: [] for name in ESTIMATORS}
    for i, share in enumerate(STEPS):
        policy = next_token_logprobs(_between(start, end, share), batch)
        for name, estimator in ESTIMATORS.items():
            found = compare(estimator, policy, reference)
            rows[name].append({"step": i, ABSCISSA: found["kl"], **found})
    return rows


@torch.no_grad()
def next_token_logprobs(model: CausalLM, batch: TokenBatch) -> Tensor:
    """Log-probs of every token at each target's position: float64 `[targets, vocab]`."""
    size = model.config.vocab_size
    expanded = replace(
        batch,
        sources=batch.sources.repeat_interleave(size),
        targets=torch.arange(size).repeat(len(batch.targets)),
        sequence_ids=batch.sequence_ids.repeat_interleave(size),
    )
    logprobs: Tensor = model(expanded).logprobs
    return logprobs.view(-1, size).double().log_softmax(-1)


def compare(estimator: Callable[[Tensor, Tensor], Tensor], policy: Tensor, reference: Tensor) -> dict[str, float]:
    """Bias and standard deviation of one estimator, averaged over positions with equal weight.

    Args:
        estimator: maps log-probs of policy and reference to values; differentiable in the policy's.
        policy: log-probs of the policy `[positions, vocab]`.
        reference: log-probs of the reference `[positions, vocab]`.
    """
    probs, logs = policy.exp(), policy.clone().requires_grad_()
    values = estimator(logs, reference)
    [slopes] = torch.autograd.grad(values.sum(), logs)
    values = values.detach()
    exact = (probs * (policy - reference)).sum(-1)  # [positions]
    expected = (probs * values).sum(-1)
    variance = (probs * (values - expected[:, None]).square()).sum(-1)
    exact_gradient = _expected_gradient(policy - reference, probs)
    gradient = _expected_gradient(slopes, probs)
    # |e_a - p|^2 = 1 - 2 p_a + |p|^2
    norms = 1 - 2 * probs + probs.square().sum(-1, keepdim=True)
    gradient_variance = (probs * slopes.square() * norms).sum(-1) - gradient.square().sum(-1)
    size = exact_gradient.square().sum(-1).mean().sqrt()
    bias = float((expected - exact).mean() / exact.mean())
    return {
        "kl": float(exact.mean()),
        "value bias": bias,
        "value error": abs(bias),
        "value deviation": float(variance.mean().sqrt() / exact.mean()),
        "gradient bias": float((gradient - exact_gradient).square().sum(-1).mean().sqrt() / size),
        "gradient deviation": float(gradient_variance.clamp(min=0).mean().sqrt() / size),
    }


def _expected_gradient(slopes: Tensor, probs: Tensor) -> Tensor:
    """sum_a p(a) slope(a) (e_a - p): `[positions, vocab]`."""
    weighted = probs * slopes
    return weighted - probs * weighted.sum(-1, keepdim=True)


def _between(start: CausalLM, end: CausalLM, share: float) -> CausalLM:
    model = deepcopy(start)
    with torch.no_grad():
        for weight, a, b in zip(model.parameters(), start.parameters(), end.parameters(), strict=True):
            weight.copy_(a + share * (b - a))
    return model
