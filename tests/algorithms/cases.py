"""Random groups and random rows for the property tests."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.covariance import COVARIANCES
from llmquest_rl.algorithms.credit import CREDITS
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.presets import PRESETS, Algorithm
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.metrics import Metrics
from llmquest_rl.objectives.policy import Policy
from tests.algorithms import oracle

MAX_TOKENS = 9
PER_TARGET = ("new", "old_logprobs", "ref_logprobs", "entropies")


def _allowed(row: dict[str, Any]) -> dict[str, Any]:
    """A dual bound that ratios of random cases reach, where the upper bound allows it; Clip-Cov without its random
    choice, and only where a token can be left out."""
    if row["dual_clip"] is not None and row["clip_high"] < 0.5:
        row = row | {"dual_clip": 1.5}
    if row["covariance"] != "clip":
        return row
    mixes = Algorithm(ratio=row["ratio"], surrogate=row["surrogate"]).mixes_tokens
    return row | ({"covariance": "kl"} if mixes else {"cov_fraction": 1.0})


rows: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "ratio": st.sampled_from(sorted(RATIOS)),
        "old_policy": st.sampled_from(["learner", "engine"]),
        "surrogate": st.sampled_from(sorted(oracle.EQUATIONS)),
        **oracle.SETTINGS,
        "aggregation": st.sampled_from(sorted(AGGREGATIONS)),
        "credit": st.sampled_from(sorted(CREDITS)),
        "future_half_life": st.floats(0.5, 8.0),
        "future_low": st.sampled_from([0.5, 1.0]),
        "future_max_ratio": st.sampled_from([1.1, 10.0]),
        "covariance": st.sampled_from(sorted(COVARIANCES)),
        "cov_fraction": st.sampled_from([2e-4, 0.3]),
        "cov_low": st.sampled_from([0.0, 0.3]),
        "cov_kl": st.floats(0.1, 2.0),
        "kl": st.sampled_from(sorted(KL_ESTIMATORS)),
        "kl_in": st.sampled_from(["loss", "reward"]),
        "kl_unbiased": st.booleans(),
        "beta": st.sampled_from([0.0, 0.04, 0.5]),
        "entropy_bonus": st.sampled_from([0.0, 0.01]),
        "top_entropy_fraction": st.sampled_from([0.2, 0.5, 1.0]),
        "off_policy_delta": st.sampled_from([None, 0.05]),
        "is_correction": st.sampled_from(sorted(CORRECTIONS)),
        "divergence_limit": st.sampled_from([0.003, 0.1]),
        "tis_floor": st.sampled_from([0.0, 0.5]),
        "tis_cap": st.sampled_from([None, 1.2, 5.0]),
    }
).map(_allowed)
"""Any combination of the cells that the loss is made of."""


class Case(NamedTuple):
    """Sequence groups with their token fields, and a model's values for their targets [targets]."""

    sequence_groups: list[SequenceGroup]
    new: Tensor
    old: Tensor
    reference: Tensor
    entropies: Tensor


def random_case(seed: int, groups: int = 3, spread: float = 0.4, lengths: tuple[int, int] = (1, MAX_TOKENS)) -> Case:
    """Random groups; advantages differ from token to token, as a row may make them. `spread`: of the log-ratios.

    All values are float32 numbers, so that token fields hold them exactly; log-probs are below 0.
    """
    draw = np.random.default_rng(seed)
    sequence_groups, logprobs = [], []
    for _ in range(groups):
        sizes = draw.integers(lengths[0], lengths[1] + 1, draw.integers(1, 4))
        base = [draw.normal(-2, 1, n) for n in sizes]
        noisy = {name: [logprobs_near(b, spread, draw) for b in base] for name in PER_TARGET}
        token_fields = {
            "advantages": [exact(draw.normal(size=1) + 0.1 * draw.normal(size=n)) for n in sizes],
            "rollout_logprobs": [logprobs_near(b, spread, draw) for b in base],
        }
        sequence_groups.append(
            SequenceGroup(draw.integers(0, 9, 3).tolist(), [[1] * int(n) for n in sizes], token_fields)
        )
        logprobs += [noisy]
    new, old, reference, entropies = (
        torch.tensor([x for noisy in logprobs for values in noisy[name] for x in values], dtype=torch.float64)
        for name in PER_TARGET
    )
    return Case(sequence_groups, new, old, reference, entropies.abs())


def logprobs_near(base: Any, spread: float, draw: np.random.Generator) -> list[float]:
    """Noise around `base`, mirrored at 0."""
    return exact(-np.abs(base + draw.normal(0, spread, len(base))))


def exact(values: Any) -> list[float]:
    """The nearest float32 numbers."""
    return [float(value) for value in np.asarray(values, dtype=np.float32)]


def batch_of(policy: Policy, case: Case, old: bool = True) -> TokenBatch:
    """One packed batch with token weights and all token fields in float64; weights that a case has are kept."""
    weighted = case.sequence_groups
    if not all("weights" in sequence_group.token_fields for sequence_group in weighted):
        weighted = policy.assign_token_weights(weighted)
    batch = collate(weighted)
    token_fields = {name: values.double() for name, values in batch.token_fields.items()}
    # Weights come out of `assign_token_weights` in float64, and of `collate` in float32.
    token_fields["weights"] = torch.tensor(
        [w for sequence_group in weighted for row in sequence_group.token_fields["weights"] for w in row],
        dtype=torch.float64,
    )
    token_fields["ref_logprobs"] = case.reference
    if old:
        token_fields["old_logprobs"] = case.old
    return replace(batch, token_fields=token_fields)


def total(policy: Policy, batch: TokenBatch, new: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """Loss, its gradient in the log-probs and in the entropies, metrics."""
    leaf, entropy_leaf = new.clone().requires_grad_(), entropies.clone().requires_grad_()
    losses, metrics = policy.token_losses(leaf, batch, entropy_leaf)
    value = (batch.token_fields["weights"] * losses).sum()
    if value.requires_grad:
        value.backward()
    grads = (torch.zeros_like(new) if x.grad is None else x.grad for x in (leaf, entropy_leaf))
    return value.detach(), *grads, metrics


def bounds(low: float = 0.2, high: float = 0.2, dual: float | None = None, **settings: float) -> Algorithm:
    """Settings of surrogates, not validated: they may be wider than a configuration allows."""
    return Algorithm.model_construct(clip_low=low, clip_high=high, dual_clip=dual, **settings)


def all_rows() -> list[str]:
    """Names of all presets."""
    return sorted(PRESETS)


def without_chance(name: str) -> dict[str, Any]:
    """Settings with which a row makes no random choice: Clip-Cov takes all tokens of its band."""
    return {"cov_fraction": 1.0} if PRESETS[name].get("covariance") == "clip" else {}


def policy(algorithm: Algorithm) -> Policy:
    """The objective of a row at temperature 1."""
    return Policy(algorithm, 1.0, MAX_TOKENS)
