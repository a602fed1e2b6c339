"""Sampling without training: evaluation on held-out data, rollouts that are saved to a folder, answers to prompts."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from llmquest_rl.types import Group, Request
from trainer.assemble import rollout_requests, start_rollouts
from trainer.cluster.open_cluster import open_cluster
from trainer.components import RunComponents
from trainer.config.schema import Config
from trainer.sources.eval_metrics import accuracy_metrics
from trainer.sources.next_token_eval import argmax_metrics
from trainer.sources.replay import save_rollouts
from trainer.sources.rollouts import Rollouts, seed_for
from trainer.sources.sampler import check_groups


@dataclass(frozen=True)
class LiveRollouts:
    """Running rollout workers and reward workers, with the components that they were built from."""

    components: RunComponents
    rollouts: Rollouts


@contextmanager
def live_rollouts(config: Config) -> Iterator[LiveRollouts]:
    """Start the rollout workers and reward workers of a configuration, without learners.

    Raises:
        ValueError: the model, the data or a reward is faulty.
        ClusterError: the cluster is too small, or a worker does not start.
    """
    components = RunComponents(config)
    components.check_model()
    with ExitStack() as stack:
        logs = Path(mkdtemp(prefix="llmquest-logs-"))
        cluster = open_cluster(config.cluster, rollout_requests(config), logs)
        stack.callback(cluster.close)
        rollouts = start_rollouts(components, cluster, components.model_path)
        stack.callback(rollouts.close)
        rollouts.wait_ready()
        yield LiveRollouts(components, rollouts)
    shutil.rmtree(logs)  # kept after an error, whose message names them


def evaluate(config: Config) -> tuple[dict[str, float], list[Group]]:
    """Evaluate `config.model.path` on the held-out problems with the settings of `config.eval`.

    Returns:
        Metrics named `eval/...`, and one group for each problem.

    Raises:
        TooManyUnscoredError: more completions could not be graded than `graders.max_unscored_share` allows.
    """
    with live_rollouts(config) as live:
        problems = live.components.prompts.held_out(config.data.eval_size)
        groups, _ = live.rollouts.run(problems, config.eval.samples_per_prompt, config.eval_sampling, "eval")
        argmax = argmax_metrics(problems, live.rollouts.generate)
    check_groups(groups, config.graders.max_unscored_share)
    return accuracy_metrics(groups, *config.correct_if) | argmax, groups


def generate_rollouts(config: Config, steps: int, out: Path) -> Iterator[tuple[int, list[Group]]]:
    """Sample and grade the prompts of the first steps, and save the groups for `train --replay`."""
    with live_rollouts(config) as live:
        for step in range(1, steps + 1):
            problems = live.components.prompts.take(config.batch.prompts_per_step)
            n = config.batch.samples_per_prompt
            groups, _ = live.rollouts.run(problems, n, config.rollout.sampling, f"train/{step}")
            save_rollouts(out, step, groups)
            yield step, groups


def answer_prompts(config: Config, prompts: list[str], n: int) -> list[list[str]]:
    """Complete each prompt `n` times with `config.model.path`: `[prompts][n]` texts."""
    with live_rollouts(config) as live:
        renderer = live.components.renderer
        requests = [
            Request(renderer.prompt_ids(prompt), n, seed_for(config.seed, "generate", i))
            for i, prompt in enumerate(prompts)
        ]
        answers = live.rollouts.generate(requests, config.rollout.sampling)
    return [[completion.text for completion in group] for group in answers]
