"""Old names of keys and metrics. The error for an old name gives the new one."""

from typing import Annotated

from pydantic import AfterValidator

RENAMED: dict[str, str] = {
    "algorithm.entropy_share": "algorithm.top_entropy_fraction",
    "algorithm.mismatch": "algorithm.is_correction",
    "algorithm.reference_every": "algorithm.ref_sync_interval",
    "batch.max_uniform_steps": "batch.max_zero_advantage_steps",
    "batch.passes_per_step": "batch.epochs_per_step",
    "batch.uniform_rewards": "batch.zero_advantage_groups",
    "batch.updates_per_step": "batch.minibatches_per_step",
    "cluster.cpus_per_scorer": "cluster.cpus_per_reward_model",
    "cluster.gpus_per_scorer": "cluster.gpus_per_reward_model",
    "data.eval_samples": "data.eval_size",
    "learner.max_bad_steps": "learner.max_skipped_updates",
    "rollout.gap_limit": "rollout.max_logprob_gap",
    "rollout.push_every": "rollout.weight_sync_interval",
}
"""New key by old key."""

RENAMED_METRICS: dict[str, str] = {
    "learner/bad_steps": "learner/skipped_updates",
    "reward/uniform_group_share": "reward/zero_std_group_share",
    "reward/uniform_steps": "reward/zero_advantage_steps",
    "rollout/pushed_mb": "rollout/synced_mb",
}
"""New metric by old metric."""


def _check_metric(name: str) -> str:
    if new := RENAMED_METRICS.get(name):
        raise ValueError(f"this metric is now called {new}")
    return name


MetricName = Annotated[str, AfterValidator(_check_metric)]
"""The name of a metric in a configuration or a recipe."""
