"""Rules that join several options."""

from collections.abc import Callable
from dataclasses import dataclass

from llmquest_rl.algorithms.advantages import IN_DEVIATIONS, WITHOUT_GROUP
from llmquest_rl.algorithms.surrogates import ON_POLICY
from llmquest_rl.objectives import Objective
from trainer.config.schema import Config


@dataclass(frozen=True, slots=True)
class Rule:
    """`holds` must be true of every configuration to which it `applies`."""

    key: str
    """The option that a person would change."""
    holds: Callable[[Config], bool]
    message: str


def _objective(config: Config) -> Objective:
    section = config.objective
    objective: Objective = section.module.build(section.options, config.algorithm, config.rollout.sampling)
    return objective


def from_rollouts(config: Config) -> bool:
    """Whether the objective learns from rollouts (RL) rather than from given sequences."""
    return _objective(config).source == "rollout"


def optimizer_updates(config: Config) -> int:
    """In the whole run."""
    return config.steps * minibatches_per_step(config)


def minibatches_per_step(config: Config) -> int:
    """Optimizer updates that a step's data serves."""
    return config.batch.minibatches_per_step * config.batch.epochs_per_step


def _computes_old_logprobs(config: Config) -> bool:
    """And with them records which experts a mixture chose."""
    return "old_logprobs" in _objective(config).computed_logprobs(minibatches_per_step(config))


def _samples_per_step(config: Config) -> int:
    return config.batch.prompts_per_step * config.batch.samples_per_prompt


def _has_kl_in_loss(config: Config) -> bool:
    return config.algorithm.beta > 0 and config.algorithm.kl_in == "loss"


def _items_per_step(config: Config) -> int:
    return config.batch.prompts_per_step if from_rollouts(config) else config.batch.sequences_per_step


def _longest_item(config: Config) -> int:
    if from_rollouts(config):
        return config.data.max_prompt_tokens + config.rollout.sampling.max_tokens
    return config.batch.tokens_per_sequence * (2 if _objective(config).needs_whole_group else 1)


RULES = [
    Rule(
        "data.task",
        lambda c: not from_rollouts(c) or c.data.task is not None,
        "the objective learns from rollouts: name a task, e.g. `data: {task: {name: gsm8k}}`",
    ),
    Rule(
        "data.dataset",
        lambda c: from_rollouts(c) or c.data.dataset is not None,
        "the objective learns from given sequences: name a data set, e.g. `data: {dataset: {name: text, path: a.txt}}`",
    ),
    Rule(
        "rewards",
        lambda c: not from_rollouts(c) or len(c.reward_names) > 0,
        "the objective learns from rollouts: give at least one reward, e.g. `rewards: [{name: exact_number}]`, or one "
        "of `reward_models`",
    ),
    Rule(
        "rewards",
        lambda c: len({reward.name for reward in c.rewards}) == len(c.rewards),
        "two rewards have the same name; give one of them another `name` and point to it with `function`",
    ),
    Rule(
        "reward_models",
        lambda c: len(set(c.reward_names)) - len({r.name for r in c.rewards}) == len(c.reward_models),
        "a reward model has the name of another, or of a reward: each is logged by its name, so give it another one",
    ),
    Rule(
        "batch.samples_per_prompt",
        lambda c: not from_rollouts(c) or c.batch.samples_per_prompt > 1 or c.algorithm.advantage in WITHOUT_GROUP,
        "this algorithm compares the samples of a group with each other: at least 2, or algorithm.advantage: reward",
    ),
    Rule(
        "batch.prompts_per_step",
        lambda c: not from_rollouts(c) or _samples_per_step(c) > 1 or c.algorithm.normalization == "none",
        "this algorithm normalises the advantages of a step: one sample cannot be, so take more prompts or samples",
    ),
    Rule(
        "algorithm.length_penalty",
        lambda c: not from_rollouts(c) or c.algorithm.length_penalty != "relative" or c.batch.samples_per_prompt > 1,
        "`relative` compares the lengths of a group: take at least two samples of a prompt, or soft_overlong",
    ),
    Rule(
        "algorithm.normalization",
        lambda c: (
            not from_rollouts(c)
            or c.algorithm.normalization != "valid_groups"
            or c.algorithm.advantage not in WITHOUT_GROUP
        ),
        "valid_groups makes up for groups of equal rewards, which without a comparison have advantages: take another",
    ),
    Rule(
        "algorithm.normalization",
        lambda c: (
            not from_rollouts(c)
            or c.algorithm.normalization != "batch_std"
            or c.algorithm.advantage not in IN_DEVIATIONS
        ),
        "these advantages are in units of their group's deviation already, and batch_std would divide them once more: "
        "set algorithm.advantage: group_mean",
    ),
    Rule(
        "algorithm.top_entropy_fraction",
        lambda c: not from_rollouts(c) or c.algorithm.top_entropy_fraction == 1 or not c.algorithm.mixes_tokens,
        "here the loss of a token has the gradients of all tokens of its completion, so leaving out its loss would "
        "leave its gradient in: take ratio: sequence_token (the same loss, each token's own gradient) or token, and no "
        "geometric_clip",
    ),
    Rule(
        "algorithm.is_correction",
        lambda c: not from_rollouts(c) or c.algorithm.is_correction != "token_mask" or not c.algorithm.mixes_tokens,
        "here the loss of a token has the gradients of all tokens of its completion, so masking it would leave its "
        "gradient in: take sequence_mask, geometric_mask or reject, or ratio: sequence_token",
    ),
    Rule(
        "algorithm.dynamic_sampling",
        lambda c: (
            not from_rollouts(c) or not c.algorithm.dynamic_sampling or c.algorithm.advantage not in WITHOUT_GROUP
        ),
        "this algorithm does not compare within groups, so groups of equal rewards teach it something: set it to false",
    ),
    Rule(
        "algorithm.pass_k",
        lambda c: (
            not from_rollouts(c)
            or c.algorithm.advantage != "pass_at_k"
            or c.algorithm.pass_k < c.batch.samples_per_prompt
        ),
        "the best of k is compared over subsets of a group: k must be below batch.samples_per_prompt",
    ),
    Rule(
        "algorithm.surrogate",
        lambda c: not from_rollouts(c) or c.algorithm.surrogate not in ON_POLICY or minibatches_per_step(c) == 1,
        "log_prob has no importance ratio, so a step's data serves one update: set batch.minibatches_per_step and "
        "batch.epochs_per_step to 1, or take clip or clipped_weight",
    ),
    Rule(
        "algorithm.old_policy",
        lambda c: not from_rollouts(c) or c.algorithm.surrogate not in ON_POLICY or c.algorithm.old_policy == "learner",
        "log_prob has no importance ratio to the engine, so nothing would make up for its rounding: take learner, with "
        "a correction by tis_cap, or clip or clipped_weight",
    ),
    Rule(
        "algorithm.kl",
        lambda c: (
            not from_rollouts(c)
            or c.algorithm.beta == 0
            or c.algorithm.kl != "k1"
            or c.algorithm.kl_in == "reward"
            or c.algorithm.kl_unbiased
        ),
        "the expected gradient of k1 in the loss is 0, it would only add noise: take k2 or k3, or k1 with "
        "kl_unbiased: true or kl_in: reward",
    ),
    Rule(
        "algorithm.ref_sync_interval",
        lambda c: not from_rollouts(c) or c.algorithm.ref_sync_interval is None or c.algorithm.beta > 0,
        "without a KL no reference model is held: set algorithm.beta above 0",
    ),
    Rule(
        "algorithm.routing_replay",
        lambda c: not from_rollouts(c) or not c.algorithm.routing_replay or _computes_old_logprobs(c),
        "there is nothing to replay: experts are recorded with the learner's old log-probs, which it computes where a "
        "step has several updates (batch.minibatches_per_step or epochs_per_step above 1), with old_policy: learner",
    ),
    Rule(
        "algorithm.kl_unbiased",
        lambda c: not from_rollouts(c) or not c.algorithm.kl_unbiased or _has_kl_in_loss(c),
        "it weights the KL in the loss, and there is none: set algorithm.beta above 0 and kl_in: loss",
    ),
    Rule(
        "algorithm.kl_unbiased",
        lambda c: not from_rollouts(c) or not c.algorithm.kl_unbiased or c.algorithm.kl in ("k1", "k3"),
        "k2 has the KL's gradient without the weight, and neither k2 nor abs has it with one: take k1 or k3, or set "
        "kl_unbiased: false",
    ),
    Rule(
        "batch.minibatches_per_step",
        lambda c: _items_per_step(c) % c.batch.minibatches_per_step == 0,
        "it must divide prompts_per_step (RL) or sequences_per_step (supervised), so that minibatches are equal",
    ),
    Rule(
        "batch.tokens_per_microbatch",
        lambda c: c.batch.tokens_per_microbatch >= _longest_item(c),
        "one sequence of the longest allowed length must fit: at least max_prompt_tokens + sampling.max_tokens (RL) or "
        "tokens_per_sequence (supervised); with objective reward_model a pair, so twice tokens_per_sequence",
    ),
    Rule(
        "rollout.sampling.temperature",
        lambda c: not from_rollouts(c) or c.rollout.sampling.temperature > 0,
        "training samples must differ: above 0 (greedy decoding is for `eval.temperature`)",
    ),
    Rule(
        "optimizer.warmup_steps",
        lambda c: c.optimizer.warmup_steps < optimizer_updates(c) or c.optimizer.warmup_steps == 0,
        "the warm-up must end before the run does: fewer than steps x minibatches_per_step x epochs_per_step",
    ),
    Rule(
        "learner.offload",
        lambda c: c.learner.offload != "optimizer" or c.learner.zero_stage >= 1,
        "DeepSpeed offloads the optimizer from zero_stage 1 on",
    ),
    Rule(
        "learner.offload",
        lambda c: c.learner.offload != "parameters" or c.learner.zero_stage == 3,
        "DeepSpeed offloads parameters with zero_stage 3 only",
    ),
    Rule(
        "cluster.kind",
        lambda c: c.cluster.kind != "inline" or c.learner.processes == 1,
        "`inline` is one process: set learner.processes to 1, or use `ray`",
    ),
    Rule(
        "eval.every",
        lambda c: c.eval.every == 0 or c.data.eval_size > 0,
        "there is nothing to evaluate on: set data.eval_size above 0, or eval.every to 0",
    ),
    Rule(
        "eval.reward",
        lambda c: c.eval.reward is None or c.eval.reward in c.reward_names,
        "no reward has this name; it must be one of `rewards` or `reward_models`, or null for the first",
    ),
    Rule(
        "checkpoint.best_metric",
        lambda c: not (c.checkpoint.best_metric or "").startswith("eval/") or c.eval.every > 0,
        "it is never measured: set eval.every above 0, or best_metric to null",
    ),
]


def broken_rules(config: Config) -> list[tuple[str, str]]:
    """(key, message) of every rule that the configuration breaks."""
    return [(rule.key, rule.message) for rule in RULES if not rule.holds(config)]
