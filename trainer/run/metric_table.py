"""Every metric that a run can log, with its unit and its meaning. docs/metrics.md is made from this table.

The file of an objective describes the metrics of its loss (`METRICS` there), and this file describes the others. A test
compares the table with the names in the code, and with the `metrics.jsonl` of whole runs.
"""

import re

from llmquest_rl.objectives import OBJECTIVES, Descriptions

AREAS: dict[str, str] = {
    "reward": "The rewards of the completions that the step sampled.",
    "rollout": "Sampling: its volume, its speed and the weights that it uses.",
    "policy": "The policy-gradient loss. Means are over the completion tokens in the loss, of all updates of the step.",
    "train": "The supervised objectives: next token, classification and reward model.",
    "eval": "Held-out data. These keys appear in the steps that evaluate.",
    "aux": "Losses that the model itself adds to the objective.",
    "moe": "Routers of mixtures of experts. Means are over the updates of the step.",
    "learner": "The optimizer and the work of the learner processes.",
    "data": "The position in the data, and the rows that were left out.",
    "time": "Wall-clock times.",
    "checkpoint": "Checkpoints.",
    "memory": "Memory of the learner processes.",
    "system": "The machine that runs the driver process.",
    "tracking": "The log of metrics itself.",
}
"""The part of a name before the slash, and one sentence on it."""

OF_THE_TRAINER: dict[str, tuple[str, str]] = {
    # --- rollouts ---
    "reward/mean": ("reward", "Weighted total reward of a completion, mean over the scored completions."),
    "reward/std": ("reward", "Standard deviation of the total reward over all scored completions of the step."),
    "reward/group_std": ("reward", "Standard deviation of the total reward within a group, mean over the groups."),
    "reward/<name>": ("reward", "One reward by its name, before weighting, mean over the completions it applies to."),
    "reward/<name>/<component>": ("reward", "One component of a reward that returns several, mean."),
    "reward/zero_std_group_share": (
        "share",
        "Groups whose rewards are all equal, so that there is nothing to learn from.",
    ),
    "reward/zero_advantage_steps": ("steps", "Consecutive steps, up to this one, in which no group had an advantage."),
    "reward/length_penalty": ("reward", "Amount that the length penalty adds to a reward, mean."),
    "reward/sampled_mean": (
        "reward",
        "Dynamic sampling: total reward, mean over the scored completions of all rounds, before groups are selected.",
    ),
    "reward/unscored_share": ("share", "Completions without a score. They count in neither baseline nor loss."),
    "reward/scored_samples": ("count", "Completions with a score."),
    "reward/failed_<kind>": (
        "count",
        "Completions that could not be graded, by cause: `timeout`, `memory`, `crash`, `exception` or `invalid`.",
    ),
    "reward/grader_restarts": ("count", "Graders and reward models that died and were restarted since the start."),
    "rollout/tokens": ("tokens", "Completion tokens that were sampled."),
    "rollout/tokens_per_s": ("tokens/s", "Sampled completion tokens per second, all rollout workers together."),
    "rollout/completion_tokens": ("tokens", "Length of a completion, mean."),
    "rollout/completion_tokens_max": ("tokens", "Length of the longest completion."),
    "rollout/repetition": (
        "share",
        "Runs of four tokens that occurred before in the same completion, mean. A policy that exploits its reward "
        "often repeats itself.",
    ),
    "rollout/truncated_share": ("share", "Completions that were cut at the token limit."),
    "rollout/right_tokens": ("tokens", "Length of a correct completion, mean. Absent if there is none."),
    "rollout/wrong_tokens": ("tokens", "Length of an incorrect completion, mean. Absent if there is none."),
    "rollout/empty_samples": ("count", "Completions without a token. They are left out of the loss."),
    "rollout/staleness": ("steps", "Steps by which the learners were ahead of the oldest weights that sampled."),
    "rollout/weight_version": ("steps", "Step after which the rollout workers received their present weights."),
    "rollout/synced_mb": ("MB", "Size of the weights that the rollout workers loaded, all workers together."),
    "rollout/worker_restarts": ("count", "Rollout workers that died and were restarted since the start."),
    "rollout/rounds": ("count", "Dynamic sampling: rounds of sampling in the step."),
    "rollout/sampled_groups": ("groups", "Dynamic sampling: groups that were sampled in all rounds."),
    "rollout/usable_group_share": ("share", "Dynamic sampling: sampled groups that have an advantage to learn from."),
    "rollout/reused_groups": ("groups", "Dynamic sampling: usable groups that an earlier step left over."),
    "rollout/surplus_groups": (
        "groups",
        "Dynamic sampling: usable groups beyond `batch.prompts_per_step`. They are kept until the weights change.",
    ),
    "rollout/missing_groups": (
        "groups",
        "Dynamic sampling: groups that the step lacked when `batch.max_rounds` ended the search.",
    ),
    # --- held-out data ---
    "eval/accuracy": (
        "share",
        "Rollouts: completions whose reward reaches `eval.threshold`, mean over problems. Else as `train/accuracy`.",
    ),
    "eval/accuracy_low": ("share", "Lower end of the 95 % interval of the accuracy."),
    "eval/accuracy_high": ("share", "Upper end of the 95 % interval of the accuracy."),
    "eval/pass_at_<k>": (
        "share",
        "Estimated chance that one of k completions of a problem is right; k = 2, 4, 8, ...",
    ),
    "eval/pass_at_<k>_low": ("share", "Lower end of the 95 % interval of pass@k."),
    "eval/pass_at_<k>_high": ("share", "Upper end of the 95 % interval of pass@k."),
    "eval/accuracy_easy": (
        "share",
        "Next-token reasoning: accuracy at held-out positions where the proxy has an entropy above 0.5 nats.",
    ),
    "eval/accuracy_medium": ("share", "The same above 1.0 nats."),
    "eval/accuracy_hard": ("share", "The same above 1.5 nats."),
    "eval/argmax": (
        "share",
        "Next-token reasoning: held-out positions whose true token the model finds most likely without thinking.",
    ),
    "eval/argmax_easy": ("share", "The same above 0.5 nats."),
    "eval/argmax_medium": ("share", "The same above 1.0 nats."),
    "eval/argmax_hard": ("share", "The same above 1.5 nats."),
    "eval/positions_easy": ("count", "Held-out positions above 0.5 nats with a scored completion."),
    "eval/positions_medium": ("count", "The same above 1.0 nats."),
    "eval/positions_hard": ("count", "The same above 1.5 nats."),
    "eval/tokens_per_hit": ("tokens", "Next-token reasoning: completion tokens for each right prediction."),
    "eval/reward": ("reward", "Total reward of a held-out completion, mean."),
    "eval/problems": ("count", "Held-out problems with a scored completion."),
    "eval/unscored": ("count", "Held-out completions that could not be graded."),
    "eval/completion_tokens": ("tokens", "Length of a held-out completion, mean."),
    "eval/<name>": ("nats", "As `aux/<name>`: `balance`, `router_z` or `mtp`."),
    # --- models and learners ---
    "aux/<name>": (
        "nats",
        "`balance`: load-balancing loss of the routers. `router_z`: z-loss of the routers. `mtp`: multi-token "
        "prediction. Each is multiplied by its coefficient. Mean over microbatches, weighted by their tokens.",
    ),
    "moe/max_vio": ("", "Largest load of an expert over the mean load, minus 1; mean over layers. 0 = balanced."),
    "moe/max_vio_worst": ("", "`moe/max_vio` of the layer in which it is largest."),
    "moe/expert_tokens_min": ("tokens", "Fewest tokens that an expert of any layer got in an update."),
    "moe/expert_tokens_max": ("tokens", "Most tokens that an expert of any layer got in an update."),
    "moe/idle_share": ("share", "Experts that no token of an update chose."),
    "moe/entropy": ("nats", "Entropy of a router's distribution over experts, mean over tokens and layers."),
    "moe/changed_share": ("share", "Choices of experts that differ from those made for the old policy's log-probs."),
    "learner/grad_norm": ("", "Global L2 norm of the gradient before clipping, mean over the updates of the step."),
    "learner/lr": ("", "Learning rate of the last update of the step."),
    "learner/updates": ("count", "Optimizer updates that were attempted since the start of the run."),
    "learner/skipped_updates": ("count", "Updates that were skipped since the start of the run for NaN or infinity."),
    "learner/critic_grad_norm": ("", "Norm of the critic's gradient before clipping, mean over its updates."),
    "learner/critic_skipped_updates": (
        "count",
        "The critic's skipped updates in the step.",
    ),
    "learner/tokens": ("tokens", "Tokens of the forward and backward passes. A shared prompt counts once."),
    "learner/tokens_per_s": (
        "tokens/s",
        "Tokens of the forward and backward passes per second, all learner processes together.",
    ),
    "learner/microbatches": ("count", "Forward and backward passes of the step in each process."),
    # --- around the step ---
    "data/epoch": ("epochs", "Passes over the training data so far. 0 for endless data."),
    "data/dropped_malformed_rows": ("rows", "Rows that could not be read and were left out."),
    "data/dropped_overlapping_rows": ("rows", "Training rows that were left out because they are held out as well."),
    "data/dropped_long_rows": ("rows", "Supervised rows that were left out because they are too long."),
    "data/dropped_long_prompts": ("prompts", "Prompts that were skipped as too long. Each counts once per epoch."),
    "data/dropped_long_held_out_prompts": ("prompts", "Held-out prompts that were left out because they are too long."),
    "time/step_s": ("s", "The whole step, without evaluation and checkpoint."),
    "time/generate_s": ("s", "Sampling."),
    "time/grade_s": ("s", "Grading."),
    "time/learner_prepare_s": ("s", "Old and reference log-probs, in the slowest process."),
    "time/learner_update_s": ("s", "Forward and backward passes and optimizer updates, in the slowest process."),
    "time/sync_s": ("s", "Transfer of the new weights to the rollout workers."),
    "time/eval_s": ("s", "Sampling and grading of the held-out problems."),
    "time/checkpoint_s": ("s", "The last checkpoint that was saved before this step."),
    "checkpoint/score": (
        "",
        "Value of `checkpoint.best_metric`, minus `kl_coef` x KL: the checkpoint with the best one is kept. Absent if "
        "the KL is above `max_kl`, or if the step trained on no completion.",
    ),
    "checkpoint/failed_saves": ("count", "Checkpoints that failed since the start because the disk was full."),
    "memory/learner_peak_gb": ("GB", "Largest memory of a learner process so far: on its GPU, or resident on a CPU."),
    "system/driver_memory_gb": ("GB", "Resident memory of the driver process."),
    "system/driver_peak_memory_gb": ("GB", "Largest resident memory of the driver process so far."),
    "system/memory_used_gb": ("GB", "Memory that is in use on the machine."),
    "system/cpu_share": ("share", "Use of the machine's processors since the last step."),
    "tracking/non_finite_count": ("count", "Metrics of this step that were NaN or infinite. They are written as null."),
}
"""Metrics that no objective describes."""


def _of_objectives() -> dict[str, tuple[str, str]]:
    """The metrics of the built-in objectives, and the same numbers on held-out data.

    If several objectives log one name, its meaning lists what each of them logs.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for objective in OBJECTIVES.names():
        described: Descriptions = getattr(OBJECTIVES.module(objective), "METRICS", {})
        for key, entry in described.items():
            found.setdefault(key, {})[objective] = entry
    table = {}
    for key, by_objective in found.items():
        area, _, rest = key.partition("/")
        unit = next(iter(by_objective.values()))[0]
        meanings = [meaning for _, meaning in by_objective.values()]
        named = [f"`{objective}`: {meaning}" for objective, (_, meaning) in by_objective.items()]
        table[key] = (unit, " ".join(named if len(named) > 1 else meanings))
        if area == "train":
            table[f"eval/{rest}"] = (unit, f"As `{key}`.")
    return table


METRICS: dict[str, tuple[str, str]] = OF_THE_TRAINER | {
    key: entry for key, entry in _of_objectives().items() if key not in OF_THE_TRAINER
}
"""Unit and meaning by name. A word in angle brackets stands for any word without a slash. A share is from 0 to 1."""


def entry(key: str) -> str | None:
    """The name in the table that describes a logged key: the key itself or a pattern; None if there is neither."""
    if key in METRICS:
        return key
    patterns = (name for name in METRICS if "<" in name and re.fullmatch(re.sub("<[a-z]+>", "[^/]+", name), key))
    return max(patterns, key=len, default=None)
