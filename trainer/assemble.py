"""Starts the processes of a training run from its configuration, and closes them in order."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from llmquest_rl.data.rows import DataError
from rewards.grader import Grader, check_rewards
from rollout.engine import EngineSetup, check_engine
from rollout.worker import RolloutWorker
from trainer.cluster.open_cluster import open_cluster
from trainer.cluster.worker_group import Cluster, ResourceRequest, WorkerGroup
from trainer.components import RunComponents
from trainer.config.load import dump
from trainer.config.reward_model import RewardModelConfig
from trainer.config.schema import Config
from trainer.learner.group import LearnerGroup
from trainer.learner.learner import Learner
from trainer.learner.setup import LearnerSetup
from trainer.run.folder import RunFolder
from trainer.run.progress import Progress
from trainer.run.stop import StopSignal
from trainer.run.tracking import Tracker, check_trackers
from trainer.sources.answer_logprobs import AnswerScorer
from trainer.sources.batch_source import BatchSource, DatasetSource, RolloutSource
from trainer.sources.engine_teacher import TEACHER, EngineTeacher
from trainer.sources.reference_cache import with_reference
from trainer.sources.replay import check_replay
from trainer.sources.reward_model_worker import RewardModelSetup, RewardModelWorker, check_reward_model
from trainer.sources.rollouts import RewardWorkers, Rollouts
from trainer.sources.sampler import LiveSampler, ReplayedSampler, Sampler
from trainer.sources.teacher_cache import with_teacher_cache
from trainer.training_run import TrainingRun, resume

log = logging.getLogger(__name__)

Running = tuple[TrainingRun, BatchSource, LearnerGroup]
"""A run, the source of its batches, and its learners."""

MAX_RESTARTS = 10
"""Maximum restarts per worker group before the run fails."""

GRADING_OVERHEAD_S = 60.0
"""Seconds that a call to the graders may take in addition to the time limits of the rewards."""


@contextmanager
def assemble(config: Config, resume_from: Path | None, replay: Path | None) -> Iterator[Running]:
    """Start the workers of a run; on leaving, close them in reverse order, also after an error.

    Args:
        config: the configuration.
        resume_from: folder of a run to continue; None = a new run.
        replay: folder of saved rollouts to train on; None = sample.

    Raises:
        ValueError: the data, the tokenizer, the model files, the rewards or a tracker are faulty. This is found before
            the first process starts.
        ClusterError: the cluster is too small, or a worker does not start.
    """
    components = RunComponents(config)
    check_trackers(config.tracking.trackers)
    components.check_model()
    components.check_experts()
    open_source = SOURCES[components.objective.source](components, replay)
    folder = RunFolder.open(resume_from) if resume_from else RunFolder.create(Path("runs"), config.name)
    with ExitStack() as stack:
        if message := stack.enter_context(folder.locked()):
            log.warning("%s", message)
        folder.config.write_text(dump(config))
        setup = components.learner_setup(folder.path)
        stop = stack.enter_context(StopSignal())
        cluster = open_cluster(config.cluster, open_source.requests, folder.logs)
        stack.callback(cluster.close)
        learners = start_learners(setup, config, cluster)
        stack.callback(learners.close)
        source = open_source(cluster, learners, folder, stack)
        done = resume(folder, source, learners) if resume_from else 0
        tracker = stack.enter_context(Tracker(folder, config.tracking.trackers, config.name, done + bool(done)))
        tracker.start(config.model_dump(mode="json"))
        progress = stack.enter_context(Progress(config.steps, done, config.name))
        yield TrainingRun(config, folder, source, learners, tracker, progress, stop, done), source, learners


def learner_request(config: Config) -> ResourceRequest:
    """The resources of the learners."""
    cluster = config.cluster
    return ResourceRequest("learner", config.learner.processes, cluster.cpus_per_learner or 1, cluster.gpus_per_learner)


def rollout_requests(config: Config) -> list[ResourceRequest]:
    """The resources of the workers that sample and grade."""
    cluster, count = config.cluster, config.rollout.workers
    workers = ResourceRequest("rollout", count, cluster.cpus_per_rollout_worker or 1, cluster.gpus_per_rollout_worker)
    graders = [ResourceRequest("grader", config.graders.workers, 1, 0)] if config.rewards else []
    cpus, gpus = cluster.cpus_per_reward_model or 1, cluster.gpus_per_reward_model
    reward_models = [ResourceRequest(group_name(m), m.workers, cpus, gpus) for m in config.reward_models]
    return [workers, *graders, *reward_models]


def group_name(model: RewardModelConfig) -> str:
    """The name of a reward model's worker group, in logs and error messages."""
    return f"reward-model-{model.name}"


def start_learners(setup: LearnerSetup, config: Config, cluster: Cluster) -> LearnerGroup:
    """Begin to build the learner processes."""
    size = config.learner.processes
    group = cluster.spawn(
        Learner, "learner", lambda i: {"setup": setup, "rank": i, "world_size": size}, collective=True
    )
    return LearnerGroup(group, config.learner.timeout_s, setup.objective.needs_reference)


def start_engines(
    config: Config, cluster: Cluster, name: str, model_path: Path, setup: EngineSetup
) -> WorkerGroup[RolloutWorker]:
    """Begin to build a group of workers with the engine of `rollout`."""
    engine = config.rollout.engine
    kwargs = {"engine": engine.name, "config": engine.options, "model_path": model_path, "setup": setup}
    return cluster.spawn(RolloutWorker, name, lambda i: kwargs, max_restarts=MAX_RESTARTS)


def start_rollouts(components: RunComponents, cluster: Cluster, model_path: Path) -> Rollouts:
    """Begin to build the rollout workers and the reward workers."""
    config = components.config
    group = start_engines(config, cluster, "rollout", model_path, components.engine_setup)
    options = config.rollout.answer_logprobs
    answers = None if options is None else AnswerScorer(options, components.renderer)
    return Rollouts(group, start_reward_workers(components, cluster), config.seed, config.rollout.timeout_s, answers)


def start_reward_workers(components: RunComponents, cluster: Cluster) -> list[RewardWorkers]:
    """Begin to build the graders, if there are rewards, and the processes of every reward model."""
    config, started = components.config, []
    if config.rewards:
        kwargs = {"rewards": list(config.rewards), "config": config.graders}
        graders = cluster.spawn(Grader, "grader", lambda i: kwargs, max_restarts=MAX_RESTARTS)
        started.append(RewardWorkers(graders, GRADING_OVERHEAD_S, config.graders.timeout_s * len(config.rewards)))
    return started + [_start_reward_model(setup, cluster) for setup in components.reward_model_setups]


def _start_reward_model(setup: RewardModelSetup, cluster: Cluster) -> RewardWorkers:
    name = group_name(setup.config)
    group = cluster.spawn(RewardModelWorker, name, lambda i: {"setup": setup}, max_restarts=MAX_RESTARTS)
    return RewardWorkers(group, setup.config.timeout_s)


def has_engine_teacher(components: RunComponents) -> bool:
    """Whether a worker with a rollout engine holds the objective's teacher."""
    teacher = components.objective.teacher
    return teacher is not None and teacher.in_engine


class OpenDataset:
    """Opens the source of objectives that learn from given sequences; reads the data before any process starts."""

    def __init__(self, components: RunComponents, replay: Path | None) -> None:
        if replay is not None:
            raise ValueError(
                "--replay trains on saved rollouts, but this objective learns from a data set: leave it out"
            )
        self.components = components
        self.requests = [learner_request(components.config)]
        self.source = DatasetSource(components.sequences, components.objective, components.config)

    def __call__(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> BatchSource:
        learners.group.wait_ready()
        parts, objective = self.components, self.components.objective
        sequences, seed = parts.sequences, parts.config.seed
        if objective.reference_cache is not None:
            sequences = with_reference(sequences, seed, learners, objective.reference_cache, parts.reference_keys())
        elif objective.teacher is not None and objective.teacher.cache is not None:
            sequences = with_teacher_cache(sequences, seed, objective.teacher, parts.teacher_keys(), learners)
        else:
            return self.source
        return DatasetSource(sequences, parts.objective, parts.config)


class OpenRollouts:
    """Opens the source of objectives that learn from rollouts, live or replayed."""

    def __init__(self, components: RunComponents, replay: Path | None) -> None:
        """Read the prompts, and check engine, rewards and reward models, before any process starts.

        Raises:
            ValueError: the data, the engine, a reward or a reward model is faulty, or saved rollouts are missing.
        """
        config = components.config
        self.components = components
        self.replay = replay
        self.requests = [learner_request(config)]
        self.prompts = components.prompts
        engine = config.rollout.engine
        if has_engine_teacher(components):
            self.requests.append(replace(rollout_requests(config)[0], name=TEACHER, count=1))
            assert components.reference_path is not None, "the objective requires a teacher"
            check_engine(engine.name, engine.options, components.reference_path, components.teacher_engine_setup)
        if replay is not None:
            check_replay(replay, config.steps)
            return
        self.requests += rollout_requests(config)
        check_engine(engine.name, engine.options, components.model_path, components.engine_setup)
        problems = self.prompts.held_out(1)
        if not problems:
            raise DataError(
                "every held-out prompt is too long, so the rewards cannot be checked: raise data.max_prompt_tokens"
            )
        if config.rewards:
            check_rewards(config.rewards, problems[0].columns, config.graders)
        for setup in components.reward_model_setups:
            check_reward_model(setup)

    def __call__(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> BatchSource:
        replayed = None if self.replay is None else ReplayedSampler(self.replay)
        sampler = replayed or self._live(cluster, learners, folder, stack)
        teacher = self._teacher(cluster, stack) if has_engine_teacher(self.components) else None
        return RolloutSource(self.prompts, sampler, self.components.objective, self.components.config, teacher)

    def _teacher(self, cluster: Cluster, stack: ExitStack) -> EngineTeacher:
        components, config = self.components, self.components.config
        assert components.reference_path is not None, "the objective requires a teacher"
        setup = components.teacher_engine_setup
        workers = start_engines(config, cluster, TEACHER, components.reference_path, setup)
        stack.callback(workers.close)
        workers.wait_ready()
        return EngineTeacher(workers, config.rollout.timeout_s)

    def _live(self, cluster: Cluster, learners: LearnerGroup, folder: RunFolder, stack: ExitStack) -> Sampler:
        config = self.components.config
        model_path = self.components.model_path
        if config.model.init == "random":  # only the learners have these weights: engines start from a copy
            model_path = folder.path / "initial"
            learners.export(model_path)
        rollouts = start_rollouts(self.components, cluster, model_path)
        stack.callback(rollouts.close)
        rollouts.wait_ready()  # not the learners: sampling begins while they build their models
        return LiveSampler(rollouts, config, folder.rollouts if config.rollout.save else None)


SOURCES: dict[str, type[OpenDataset] | type[OpenRollouts]] = {"dataset": OpenDataset, "rollout": OpenRollouts}
"""The class that opens a run's batch source, by the `source` of its objective."""
