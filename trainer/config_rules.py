"""Rules that join several options, and the numbers that follow from them. The one place for both."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from llmquest_rl.algorithms.advantages import WITHOUT_GROUP
from llmquest_rl.algorithms.surrogates import ON_POLICY
from llmquest_rl.objectives import Objective
from trainer.config import Config
from trainer.dynamic_sampling import prompts_to_ask


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


def _optimizer_updates(config: Config) -> int:
    return config.steps * _updates_per_step(config)


def _updates_per_step(config: Config) -> int:
    return config.batch.updates_per_step * config.batch.passes_per_step


def _computes_old_logprobs(config: Config) -> bool:
    """And with them records which experts a mixture chose."""
    return "old_logprobs" in _objective(config).streams(_updates_per_step(config))


def _samples_per_step(config: Config) -> int:
    return config.batch.prompts_per_step * config.batch.samples_per_prompt


def _has_kl_in_loss(config: Config) -> bool:
    return config.algorithm.beta > 0 and config.algorithm.kl_in == "loss"


def _items_per_step(config: Config) -> int:
    return config.batch.prompts_per_step if from_rollouts(config) else config.batch.sequences_per_step


def _longest_item(config: Config) -> int:
    if from_rollouts(config):
        return config.data.max_prompt_tokens + config.rollout.sampling.max_tokens
    return config.batch.tokens_per_sequence * (2 if _objective(config).compares else 1)


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
        lambda c: not from_rollouts(c) or len(c.judge_names) > 0,
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
        lambda c: len(set(c.judge_names)) - len({r.name for r in c.rewards}) == len(c.reward_models),
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
        lambda c: not from_rollouts(c) or c.algorithm.surrogate not in ON_POLICY or _updates_per_step(c) == 1,
        "log_prob has no importance ratio, so a step's data serves one update: set batch.updates_per_step and "
        "batch.passes_per_step to 1, or take clip or clipped_weight",
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
        "algorithm.reference_every",
        lambda c: not from_rollouts(c) or c.algorithm.reference_every is None or c.algorithm.beta > 0,
        "without a KL no reference model is held: set algorithm.beta above 0",
    ),
    Rule(
        "algorithm.routing_replay",
        lambda c: not from_rollouts(c) or not c.algorithm.routing_replay or _computes_old_logprobs(c),
        "there is nothing to replay: experts are recorded with the learner's old log-probs, which it computes where a "
        "step has several updates (batch.updates_per_step or passes_per_step above 1), with old_policy: learner",
    ),
    Rule(
        "algorithm.kl_unbiased",
        lambda c: not from_rollouts(c) or not c.algorithm.kl_unbiased or _has_kl_in_loss(c),
        "it weights the KL in the loss, and there is none: set algorithm.beta above 0 and kl_in: loss",
    ),
    Rule(
        "batch.updates_per_step",
        lambda c: _items_per_step(c) % c.batch.updates_per_step == 0,
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
        lambda c: c.optimizer.warmup_steps < _optimizer_updates(c) or c.optimizer.warmup_steps == 0,
        "the warm-up must end before the run does: fewer than steps x updates_per_step x passes_per_step",
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
        lambda c: c.eval.every == 0 or c.data.eval_samples > 0,
        "there is nothing to evaluate on: set data.eval_samples above 0, or eval.every to 0",
    ),
    Rule(
        "eval.reward",
        lambda c: c.eval.reward is None or c.eval.reward in c.judge_names,
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


def sizes(config: Config) -> list[tuple[str, str, str]]:
    """(what, how many, from what) of every number that follows from the configured sizes."""
    batch, learners = config.batch, config.learner.processes
    updates = _updates_per_step(config)
    rows = _rollout_sizes(config) if from_rollouts(config) else _dataset_sizes(config)
    cluster, scorers = config.cluster, sum(model.workers for model in config.reward_models)
    sampling_gpus = config.rollout.workers * cluster.gpus_per_rollout_worker + scorers * cluster.gpus_per_scorer
    total_gpus = learners * cluster.gpus_per_learner + sampling_gpus * from_rollouts(config)
    update = f"{batch.updates_per_step} minibatch(es) x {batch.passes_per_step} pass(es)"
    return [
        *rows,
        ("optimizer updates per step", f"{updates:,}", update),
        ("optimizer updates in the run", f"{_optimizer_updates(config):,}", f"{config.steps:,} steps x {updates:,}"),
        ("tokens per microbatch", f"<= {batch.tokens_per_microbatch:,}", "of one learner; memory only"),
        ("learner processes", f"{learners:,}", f"ZeRO stage {config.learner.zero_stage}"),
        ("GPUs", f"{total_gpus:g}", "rollout workers, reward models and learners" if total_gpus else "all on CPUs"),
    ]


def _rollout_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch, longest, graders = config.batch, config.rollout.sampling.max_tokens, config.graders
    prompts, samples = batch.prompts_per_step, batch.samples_per_prompt
    completions = prompts * samples
    computed = prompts * config.data.max_prompt_tokens + completions * longest
    groups = prompts // batch.updates_per_step
    grading = graders.workers * graders.processes if config.rewards else 0
    return [
        ("completions per step", f"{completions:,}", f"{prompts} prompts x {samples} samples"),
        (
            "prompts asked per step",
            f"<= {_most_prompts(config):,}",
            "more than a step trains on with dynamic sampling only",
        ),
        (
            "sampled tokens per step",
            f"<= {_most_prompts(config) * samples * longest:,}",
            f"{longest} tokens each at most",
        ),
        ("tokens computed per pass", f"<= {computed:,}", "completions, and each prompt once"),
        ("completions per update", f"{groups * samples:,}", f"{groups} whole groups"),
        ("groups in the run", f"{config.steps * prompts:,}", f"{config.steps:,} steps x {prompts} prompts"),
        ("rollout workers", f"{config.rollout.workers:,}", f"engine {config.rollout.engine.name}"),
        ("grader processes", f"{grading:,}", f"{graders.workers} x {graders.processes}" if grading else "no rewards"),
        ("reward model processes", f"{sum(m.workers for m in config.reward_models):,}", "each holds a whole model"),
    ]


def _most_prompts(config: Config) -> int:
    """That a step asks: with dynamic sampling, when no round brings a usable group."""
    batch = config.batch
    if not config.algorithm.dynamic_sampling:
        return batch.prompts_per_step
    return prompts_to_ask(batch, batch.prompts_per_step) * batch.max_rounds


def _dataset_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch = config.batch
    tokens = batch.sequences_per_step * batch.tokens_per_sequence
    shape = f"{batch.sequences_per_step} sequences x {batch.tokens_per_sequence} tokens"
    per_update = batch.sequences_per_step // batch.updates_per_step
    return [
        ("tokens per step", f"<= {tokens:,}", shape),
        ("sequences per update", f"{per_update:,}", f"{batch.updates_per_step} updates share a step's sequences"),
        ("tokens in the run", f"<= {tokens * config.steps:,}", f"{config.steps:,} steps"),
    ]


def sizes_table(config: Config) -> Table:
    """`sizes` as a table to print before the start."""
    table = Table(title=f"{config.name}: what follows from the configured sizes", title_justify="left")
    table.add_column("what")
    table.add_column("how many", justify="right")
    table.add_column("from", style="dim")
    for row in sizes(config):
        table.add_row(*row)
    return table
