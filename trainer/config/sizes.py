"""Sizes of a run that follow from the configured ones, e.g. completions per step and updates in the run."""

from rich.table import Table

from trainer.config.rules import from_rollouts, optimizer_updates, updates_in_a_step
from trainer.config.schema import Config


def sizes(config: Config) -> list[tuple[str, str, str]]:
    """Derived sizes of a run as rows (name, value, explanation)."""
    batch, learners = config.batch, config.learner.processes
    updates = updates_in_a_step(config)
    rows = _rollout_sizes(config) if from_rollouts(config) else _dataset_sizes(config)
    cluster, reward_models = config.cluster, sum(model.workers for model in config.reward_models)
    sampling_gpus = (
        config.rollout.workers * cluster.gpus_per_rollout_worker + reward_models * cluster.gpus_per_reward_model
    )
    total_gpus = learners * cluster.gpus_per_learner + sampling_gpus * from_rollouts(config)
    update = f"{batch.minibatches_per_step} minibatch(es) x {batch.epochs_per_step} epoch(s)"
    return [
        *rows,
        ("optimizer updates per step", f"{updates:,}", update),
        ("optimizer updates in the run", f"{optimizer_updates(config):,}", f"{config.steps:,} steps x {updates:,}"),
        ("tokens per microbatch", f"<= {batch.tokens_per_microbatch:,}", "per learner; sets memory use, not results"),
        ("learner processes", f"{learners:,}", f"ZeRO stage {config.learner.zero_stage}"),
        (
            "GPUs",
            f"{total_gpus:g}",
            "rollout workers, reward models and learners" if total_gpus else "everything runs on CPUs",
        ),
    ]


def _rollout_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch, longest, graders = config.batch, config.rollout.sampling.max_tokens, config.graders
    prompts, samples = batch.prompts_per_step, batch.samples_per_prompt
    completions = prompts * samples
    computed = prompts * config.data.max_prompt_tokens + completions * longest
    groups = prompts // batch.minibatches_per_step
    grading = graders.workers * graders.processes if config.rewards else 0
    scoring = sum(model.workers for model in config.reward_models)
    most_prompts, dynamic = _most_prompts(config), config.algorithm.dynamic_sampling
    return [
        ("completions per step", f"{completions:,}", f"{prompts} prompts x {samples} samples"),
        (
            "prompts sampled per step",
            f"<= {most_prompts:,}",
            f"at most {config.batch.max_rounds} rounds" if dynamic else "one round",
        ),
        ("sampled tokens per step", f"<= {most_prompts * samples * longest:,}", f"at most {longest} tokens each"),
        ("tokens computed per epoch", f"<= {computed:,}", "completions, and each prompt once"),
        ("completions per update", f"{groups * samples:,}", f"{groups} complete groups"),
        ("groups in the run", f"{config.steps * prompts:,}", f"{config.steps:,} steps x {prompts} prompts"),
        ("rollout workers", f"{config.rollout.workers:,}", f"engine {config.rollout.engine.name}"),
        (
            "grader processes",
            f"{grading:,}",
            f"{graders.workers} graders x {graders.processes}" if grading else "no rewards",
        ),
        ("reward model processes", f"{scoring:,}", "each holds a complete model" if scoring else "no reward models"),
    ]


def _most_prompts(config: Config) -> int:
    """Maximum prompts in a step. Dynamic sampling needs this many if no round yields a usable group."""
    batch = config.batch
    if not config.algorithm.dynamic_sampling:
        return batch.prompts_per_step
    return batch.prompts_to_sample(batch.prompts_per_step) * batch.max_rounds


def _dataset_sizes(config: Config) -> list[tuple[str, str, str]]:
    batch = config.batch
    tokens = batch.sequences_per_step * batch.tokens_per_sequence
    shape = f"{batch.sequences_per_step} sequences x {batch.tokens_per_sequence} tokens"
    per_update = batch.sequences_per_step // batch.minibatches_per_step
    return [
        ("tokens per step", f"<= {tokens:,}", shape),
        ("sequences per update", f"{per_update:,}", f"a step's sequences / {batch.minibatches_per_step} minibatch(es)"),
        ("tokens in the run", f"<= {tokens * config.steps:,}", f"{config.steps:,} steps"),
    ]


def sizes_table(config: Config) -> Table:
    """The derived sizes as a table, which `train` prints before it starts."""
    table = Table(title=f"{config.name}: sizes of the run", title_justify="left")
    table.add_column("size")
    table.add_column("value", justify="right")
    table.add_column("explanation", style="dim")
    for row in sizes(config):
        table.add_row(*row)
    return table
