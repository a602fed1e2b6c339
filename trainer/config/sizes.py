"""The numbers that follow from the configured sizes."""

from rich.table import Table

from trainer.config.rules import from_rollouts, minibatches_per_step, optimizer_updates
from trainer.config.schema import Config


def sizes(config: Config) -> list[tuple[str, str, str]]:
    """(what, how many, from what) of every number that follows from the configured sizes."""
    batch, learners = config.batch, config.learner.processes
    updates = minibatches_per_step(config)
    rows = _rollout_sizes(config) if from_rollouts(config) else _dataset_sizes(config)
    cluster, scorers = config.cluster, sum(model.workers for model in config.reward_models)
    sampling_gpus = config.rollout.workers * cluster.gpus_per_rollout_worker + scorers * cluster.gpus_per_reward_model
    total_gpus = learners * cluster.gpus_per_learner + sampling_gpus * from_rollouts(config)
    update = f"{batch.minibatches_per_step} minibatch(es) x {batch.epochs_per_step} pass(es)"
    return [
        *rows,
        ("optimizer updates per step", f"{updates:,}", update),
        ("optimizer updates in the run", f"{optimizer_updates(config):,}", f"{config.steps:,} steps x {updates:,}"),
        ("tokens per microbatch", f"<= {batch.tokens_per_microbatch:,}", "of one learner; memory only"),
        ("learner processes", f"{learners:,}", f"ZeRO stage {config.learner.zero_stage}"),
        ("GPUs", f"{total_gpus:g}", "rollout workers, reward models and learners" if total_gpus else "all on CPUs"),
    ]


def _rollout_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch, longest, graders = config.batch, config.rollout.sampling.max_tokens, config.graders
    prompts, samples = batch.prompts_per_step, batch.samples_per_prompt
    completions = prompts * samples
    computed = prompts * config.data.max_prompt_tokens + completions * longest
    groups = prompts // batch.minibatches_per_step
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
    return batch.prompts_to_ask(batch.prompts_per_step) * batch.max_rounds


def _dataset_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch = config.batch
    tokens = batch.sequences_per_step * batch.tokens_per_sequence
    shape = f"{batch.sequences_per_step} sequences x {batch.tokens_per_sequence} tokens"
    per_update = batch.sequences_per_step // batch.minibatches_per_step
    return [
        ("tokens per step", f"<= {tokens:,}", shape),
        ("sequences per update", f"{per_update:,}", f"{batch.minibatches_per_step} updates share a step's sequences"),
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
