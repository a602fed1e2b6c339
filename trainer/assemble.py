"""From a configuration to a running session, and its orderly end."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llmquest_rl.data.rows import DataError
from rewards.grader import Grader, check_rewards
from rollout.engine import check_engine
from rollout.worker import RolloutWorker
from trainer.cluster.worker_group import Cluster, ResourceRequest, open_cluster
from trainer.components import RunComponents
from trainer.config.load import dump
from trainer.config.reward_model import RewardModelConfig
from trainer.config.schema import Config
from trainer.learner.group import LearnerGroup
from trainer.learner.learner import Learner
from trainer.run.folder import RunFolder
from trainer.run.progress import Progress
from trainer.run.stop import StopSignal
from trainer.run.tracking import Tracker, check_trackers
from trainer.session import TrainingRun, resume
from trainer.sources.batch_source import BatchSource, DatasetSource, RolloutSource
from trainer.sources.dynamic_sampling import DynamicSampling
from trainer.sources.generate_and_grade import RewardWorkers, Rollouts
from trainer.sources.replay import check_replay
from trainer.sources.reward_model_worker import RewardModelSetup, RewardModelWorker, check_reward_model
from trainer.sources.sampler import GroupCollector, LiveSampler, ReplayedSampler, Sampler, SingleRound

log = logging.getLogger(__name__)

Running = tuple[TrainingRun, BatchSource, LearnerGroup]

MAX_RESTARTS = 10
"""Deaths of rollout workers, of graders, or of one reward model's processes, that one run makes good."""

START_TO_GRADE_S = 60.0
"""What graders may take beside their rewards' own time limits."""


@contextmanager
def assemble(config: Config, resume_from: Path | None, replay: Path | None) -> Iterator[Running]:
    """Start everything that a run needs; on leaving, close it in reverse, whatever happened.

    What can be wrong with data, tokenizer, model files or trackers is found before the first process starts.
    """
    parts = RunComponents(config)
    check_trackers(config.tracking.trackers)
    parts.check_model()
    parts.check_experts()
    open_source = SOURCES[parts.objective.source](parts, replay)
    folder = RunFolder.open(resume_from) if resume_from else RunFolder.create(Path("runs"), config.name)
    with ExitStack() as stack:
        if message := stack.enter_context(folder.locked()):
            log.warning("%s", message)
        folder.config.write_text(dump(config))
        stop = stack.enter_context(StopSignal())
        cluster = open_cluster(config.cluster, open_source.needs, folder.logs)
        stack.callback(cluster.close)
        learners = start_learners(parts, cluster, folder)
        stack.callback(learners.close)
        source = open_source(cluster, learners, folder, stack)
        done = resume(folder, source, learners) if resume_from else 0
        tracker = stack.enter_context(Tracker(folder, config.tracking.trackers, config.name, done + bool(done)))
        tracker.start(config.model_dump(mode="json"))
        progress = stack.enter_context(Progress(config.steps, done, config.name))
        yield TrainingRun(config, folder, source, learners, tracker, progress, stop, done), source, learners


def needs(config: Config, problems: bool) -> list[ResourceRequest]:
    """What the run asks of the cluster."""
    cluster = config.cluster
    learners = ResourceRequest(
        "learner", config.learner.processes, cluster.cpus_per_learner or 1, cluster.gpus_per_learner
    )
    workers = ResourceRequest(
        "rollout", config.rollout.workers, cluster.cpus_per_rollout_worker or 1, cluster.gpus_per_rollout_worker
    )
    graders = [ResourceRequest("grader", config.graders.workers, 1, 0)] if config.rewards else []
    scorers = [
        ResourceRequest(
            reward_model_group(model), model.workers, cluster.cpus_per_reward_model or 1, cluster.gpus_per_reward_model
        )
        for model in config.reward_models
    ]
    return [learners, workers, *graders, *scorers] if problems else [learners]


def reward_model_group(model: RewardModelConfig) -> str:
    """What the cluster calls the processes of a reward model."""
    return f"scorer-{model.name}"


def start_learners(parts: RunComponents, cluster: Cluster, folder: RunFolder) -> LearnerGroup:
    """Begin to build the learner processes."""
    config = parts.config
    setup, size = parts.learner_setup(folder.path), config.learner.processes
    handle = cluster.spawn(
        Learner, "learner", lambda i: {"setup": setup, "rank": i, "world_size": size}, collective=True
    )
    return LearnerGroup(handle, config.learner.timeout_s, config.cluster.start_timeout_s)


def start_rollouts(parts: RunComponents, cluster: Cluster, model_path: Path) -> Rollouts:
    """Begin to build rollout workers and judges."""
    config = parts.config
    setup, section = parts.engine_setup, config.rollout.engine
    worker = {"engine": section.name, "config": section.options, "model_path": model_path, "setup": setup}
    workers = cluster.spawn(RolloutWorker, "rollout", lambda i: worker, max_restarts=MAX_RESTARTS)
    return Rollouts(workers, start_reward_workers(parts, cluster), config.seed, config.rollout.timeout_s)


def start_reward_workers(parts: RunComponents, cluster: Cluster) -> list[RewardWorkers]:
    """Begin to build the graders, if there are rewards, and the processes of every reward model."""
    config, judges = parts.config, []
    if config.rewards:
        grader = {"rewards": list(config.rewards), "config": config.graders}
        graders = cluster.spawn(Grader, "grader", lambda i: grader, max_restarts=MAX_RESTARTS)
        judges.append(RewardWorkers(graders, START_TO_GRADE_S, config.graders.timeout_s * len(config.rewards)))
    return judges + [_start_reward_model(setup, cluster) for setup in parts.reward_model_setups]


def _start_reward_model(setup: RewardModelSetup, cluster: Cluster) -> RewardWorkers:
    scorer = {"setup": setup}
    scorers = cluster.spawn(
        RewardModelWorker, reward_model_group(setup.config), lambda i: scorer, max_restarts=MAX_RESTARTS
    )
    return RewardWorkers(scorers, setup.config.timeout_s)


class OpenDataset:
    """Opens the source of objectives that learn from given sequences; reads the data before anything starts."""

    def __init__(self, parts: RunComponents, replay: Path | None) -> None:
        self.needs = needs(parts.config, problems=False)
        self.source = DatasetSource(parts.sequences, parts.objective, parts.config)

    def __call__(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> BatchSource:
        learners.wait_ready()
        return self.source


class OpenRollouts:
    """Opens the source of objectives that learn from rollouts, live or replayed."""

    def __init__(self, parts: RunComponents, replay: Path | None) -> None:
        config = parts.config
        self.parts = parts
        self.replay = replay
        self.needs = needs(config, problems=replay is None)
        self.prompts = parts.prompts
        section = config.rollout.engine
        if replay is not None:
            check_replay(replay, config.steps)
            return
        check_engine(section.name, section.options, parts.model_path, parts.engine_setup)
        problems = self.prompts.held_out(1)
        if not problems:
            raise DataError("every held-out prompt is too long: raise data.max_prompt_tokens")
        if config.rewards:
            check_rewards(config.rewards, problems[0].columns, config.graders)
        for scorer in parts.reward_model_setups:
            check_reward_model(scorer)

    def __call__(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> BatchSource:
        replayed = None if self.replay is None else ReplayedSampler(self.replay)
        sampler = replayed or self._live(cluster, learners, folder, stack)
        learners.wait_ready()
        return RolloutSource(self.prompts, sampler, self.parts.objective, self.parts.config)

    def _live(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> Sampler:
        config = self.parts.config
        model_path = self.parts.model_path
        if config.model.init == "random":  # only the learners have these weights: engines start from a copy
            model_path = folder.path / "initial"
            learners.wait_ready()
            learners.export(model_path)
        rollouts = start_rollouts(self.parts, cluster, model_path)
        stack.callback(rollouts.close)
        rollouts.wait_ready(config.cluster.start_timeout_s)
        save_to = folder.rollouts if config.rollout.save else None
        gather: GroupCollector = (
            DynamicSampling(config.algorithm) if config.algorithm.dynamic_sampling else SingleRound()
        )
        return LiveSampler(rollouts, gather, config.graders.max_unscored_share, config.rollout.sleep, save_to)


SOURCES: dict[str, type[OpenDataset] | type[OpenRollouts]] = {"dataset": OpenDataset, "rollout": OpenRollouts}
