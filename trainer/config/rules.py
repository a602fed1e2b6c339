"""Rules on combinations of options."""

from llmquest_rl.algorithms.advantages import ADVANTAGES, Advantage
from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS, Normalization
from llmquest_rl.loader import users_code
from llmquest_rl.objectives import Objective
from trainer.config.rule import Rule
from trainer.config.schema import Config


def build_objective(config: Config) -> Objective:
    """The objective of a run. It tells where batches come from and which log-probs they need."""
    section = config.objective
    with users_code(section.name):
        objective: Objective = section.module.build(section.options, config.algorithm, config.rollout.sampling)
    return objective


def from_rollouts(config: Config) -> bool:
    """Whether the objective learns from rollouts (RL) rather than from given sequences."""
    return build_objective(config).source == "rollout"


def optimizer_updates(config: Config) -> int:
    """Number of optimizer updates in the whole run."""
    return config.steps * updates_in_a_step(config)


def updates_in_a_step(config: Config) -> int:
    """Number of optimizer updates in one step: minibatches times epochs."""
    return config.batch.minibatches_per_step * config.batch.epochs_per_step


def _computes_old_logprobs(config: Config) -> bool:
    """Whether the learner computes the old policy's log-probs, and records the experts of a mixture with them."""
    return "old_logprobs" in build_objective(config).computed_logprobs(updates_in_a_step(config))


def _has_kl_in_loss(config: Config) -> bool:
    return config.algorithm.beta > 0 and config.algorithm.kl_in == "loss"


def _learns_from_kl(config: Config) -> bool:
    """Whether the KL in the loss has an expected gradient."""
    algorithm = config.algorithm
    return algorithm.kl_unbiased or not KL_ESTIMATORS[algorithm.kl].only_noise_in_loss


def _advantage(config: Config) -> Advantage:
    return ADVANTAGES[config.algorithm.advantage]


def _normalization(config: Config) -> Normalization:
    return NORMALIZATIONS[config.algorithm.normalization]


def _has_ratio(config: Config) -> bool:
    return SURROGATES[config.algorithm.surrogate].has_ratio


def _items_per_step(config: Config) -> int:
    return config.batch.prompts_per_step if from_rollouts(config) else config.batch.sequences_per_step


def _longest_item(config: Config) -> int:
    together = max(1, build_objective(config).needs_whole_group)
    if from_rollouts(config):
        return config.data.max_prompt_tokens + config.rollout.sampling.max_tokens * together
    return config.batch.tokens_per_sequence * together


RULES = [
    Rule(
        "data.task",
        lambda c: c.data.task is not None,
        "the objective learns from rollouts: name a task, e.g. `data: {task: {name: gsm8k}}`",
        applies_to="rollout",
    ),
    Rule(
        "data.dataset",
        lambda c: c.data.dataset is not None,
        "the objective learns from given sequences: name a data set, e.g. `data: {dataset: {name: text, path: a.txt}}`",
        applies_to="dataset",
    ),
    Rule(
        "rewards",
        lambda c: len(c.reward_names) > 0,
        "the objective learns from rollouts: give at least one reward, e.g. `rewards: [{name: exact_number}]`, or a "
        "reward model",
        applies_to="rollout",
    ),
    Rule(
        "rewards",
        lambda c: len({reward.name for reward in c.rewards}) == len(c.rewards),
        "two rewards have the same name: give one of them another `name` and point to the reward with `function`",
    ),
    Rule(
        "rollout.answer_logprobs",
        lambda c: c.rollout.answer_logprobs is not None or all(r.function != "likelihood_gain" for r in c.rewards),
        "the reward likelihood_gain reads the log-prob of the answer: write `answer_logprobs: {}`",
        applies_to="rollout",
    ),
    Rule(
        "reward_models",
        lambda c: len(set(c.reward_names)) - len({r.name for r in c.rewards}) == len(c.reward_models),
        "a reward model has the name of another one, or of a reward. Metrics are logged by name, so rename one of them",
    ),
    Rule(
        "batch.samples_per_prompt",
        lambda c: c.batch.samples_per_prompt > 1 or not _advantage(c).group_relative,
        "this algorithm compares the samples of a group: set at least 2, or algorithm.advantage: reward",
        applies_to="rollout",
    ),
    Rule(
        "batch.prompts_per_step",
        lambda c: c.batch.prompts_per_step * c.batch.samples_per_prompt > 1 or c.algorithm.normalization == "none",
        "this algorithm normalises the advantages of a step, which needs more than one sample: raise it or "
        "batch.samples_per_prompt",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.length_penalty",
        lambda c: c.batch.samples_per_prompt > 1 or not LENGTH_PENALTIES[c.algorithm.length_penalty].group_relative,
        "this penalty compares the lengths of a group: set batch.samples_per_prompt to 2 or more, or use soft_overlong",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.normalization",
        lambda c: _advantage(c).group_relative or not _normalization(c).needs_comparison,
        "it assumes that groups of equal rewards have no advantages, but they have, because this algorithm does not "
        "compare within groups: choose another normalization",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.normalization",
        lambda c: not (_normalization(c).in_deviations and _advantage(c).in_deviations),
        "the advantages are already divided by the standard deviation of their group, and this would divide them "
        "again: set algorithm.advantage: group_mean",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.top_entropy_fraction",
        lambda c: c.algorithm.top_entropy_fraction == 1 or not c.algorithm.mixes_tokens,
        "with this ratio or surrogate the loss of a token depends on all tokens of its completion, so tokens that are "
        "left out still have a gradient: set ratio: sequence_token (the same loss, but each token has its own "
        "gradient) or ratio: token, and do not use the surrogate geometric_clip",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.is_correction",
        lambda c: not (CORRECTIONS[c.algorithm.is_correction].masks_tokens and c.algorithm.mixes_tokens),
        "with this ratio or surrogate the loss of a token depends on all tokens of its completion, so a masked token "
        "still has a gradient: use sequence_mask, geometric_mask or reject, or ratio: sequence_token",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.dynamic_sampling",
        lambda c: _advantage(c).group_relative or not c.algorithm.dynamic_sampling,
        "this algorithm does not compare within groups, so groups of equal rewards have a gradient: set it to false",
        applies_to="rollout",
    ),
    Rule(
        "batch.dynamic_sampling_from",
        lambda c: c.batch.dynamic_sampling_from == 1 or c.algorithm.dynamic_sampling,
        "there is no dynamic sampling: set algorithm.dynamic_sampling to true, or leave this out",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.pass_k",
        lambda c: c.algorithm.advantage != "pass_at_k" or c.algorithm.pass_k < c.batch.samples_per_prompt,
        "pass_at_k compares the subsets of k samples of a group: set it below batch.samples_per_prompt",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.credit",
        lambda c: c.algorithm.credit == "uniform" or c.algorithm.old_policy == "engine" or updates_in_a_step(c) > 1,
        "credit comes from the change since the old policy, which the only update of a step does not see: raise "
        "batch.minibatches_per_step or batch.epochs_per_step, or set old_policy: engine",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.surrogate",
        lambda c: _has_ratio(c) or updates_in_a_step(c) == 1,
        "this surrogate has no importance ratio, so a step's data are good for one update only: set "
        "batch.minibatches_per_step and batch.epochs_per_step to 1, or use clip or clipped_weight",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.old_policy",
        lambda c: _has_ratio(c) or c.algorithm.old_policy == "learner",
        "the surrogate has no importance ratio to the engine, so nothing would correct for the engine's rounding: use "
        "learner, with a correction by tis_cap, or the surrogate clip or clipped_weight",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.kl",
        lambda c: _learns_from_kl(c) or not _has_kl_in_loss(c),
        "the expected gradient of k1 in the loss is 0, so it would only add noise: use k2 or k3, or k1 with "
        "kl_unbiased: true or kl_in: reward",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.ref_sync_interval",
        lambda c: c.algorithm.beta > 0 or c.algorithm.ref_sync_interval is None,
        "without a KL there is no reference model: set algorithm.beta above 0",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.routing_replay",
        lambda c: _computes_old_logprobs(c) or not c.algorithm.routing_replay,
        "there is nothing to replay. The learner records experts with the old log-probs, which it computes only if "
        "old_policy is learner and a step has several updates (batch.minibatches_per_step or epochs_per_step above "
        "1): change these, or set it to false",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.kl_unbiased",
        lambda c: _has_kl_in_loss(c) or not c.algorithm.kl_unbiased,
        "it weights the KL in the loss, but there is none: set algorithm.beta above 0 and kl_in: loss",
        applies_to="rollout",
    ),
    Rule(
        "algorithm.kl_unbiased",
        lambda c: KL_ESTIMATORS[c.algorithm.kl].exact_if_weighted or not c.algorithm.kl_unbiased,
        "with the weight only k1 and k3 have the gradient of the KL (k2 has it without the weight, abs never): set "
        "algorithm.kl to k1 or k3, or kl_unbiased to false",
        applies_to="rollout",
    ),
    Rule(
        "batch.minibatches_per_step",
        lambda c: _items_per_step(c) % c.batch.minibatches_per_step == 0,
        "it must divide prompts_per_step (RL) or sequences_per_step (supervised), so that minibatches are equal",
    ),
    Rule(
        "batch.tokens_per_microbatch",
        lambda c: c.batch.tokens_per_microbatch >= _longest_item(c),
        "one sequence of the maximum length must fit: at least max_prompt_tokens + sampling.max_tokens (RL) or "
        "tokens_per_sequence (supervised); with each sequence of a group if the objective compares them, e.g. twice "
        "tokens_per_sequence for pairs",
    ),
    Rule(
        "rollout.sampling.temperature",
        lambda c: c.rollout.sampling.temperature > 0,
        "the samples of a prompt must differ: set a value above 0 (for greedy evaluation set `eval.temperature` to 0)",
        applies_to="rollout",
    ),
    Rule(
        "optimizer.warmup_steps",
        lambda c: c.optimizer.warmup_steps < optimizer_updates(c) or c.optimizer.warmup_steps == 0,
        "the warm-up must end before the run does: set it below steps x minibatches_per_step x epochs_per_step",
    ),
    Rule(
        "learner.offload",
        lambda c: c.learner.offload != "optimizer" or c.learner.zero_stage >= 1,
        "DeepSpeed offloads the optimizer with zero_stage 1, 2 or 3 only",
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
        "no reward has this name: give a name in `rewards` or `reward_models`, or null for the first of them",
    ),
    Rule(
        "checkpoint.best_metric",
        lambda c: not (c.checkpoint.best_metric or "").startswith("eval/") or c.eval.every > 0,
        "this metric is never measured: set eval.every above 0, or best_metric to null",
    ),
    Rule(
        "checkpoint.max_kl",
        lambda c: not c.checkpoint.reads_kl or (from_rollouts(c) and build_objective(c).needs_reference),
        "max_kl and kl_coef need the KL of sampled completions to a reference: use RL with algorithm.beta above 0",
    ),
]


def broken_rules(config: Config) -> list[tuple[str, str]]:
    """(key, message) of every rule that the configuration breaks."""
    source = build_objective(config).source
    applicable = [rule for rule in RULES if rule.applies_to in ("any", source)]
    return [(rule.key, rule.message) for rule in applicable if not rule.holds(config)]
