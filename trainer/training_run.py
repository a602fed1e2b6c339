"""A training run: it counts the steps, evaluates, logs, saves checkpoints, and stops on request."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.config.schema import Config
from trainer.learner.group import LearnerGroup, StepBatch
from trainer.run import checkpoint
from trainer.run.folder import RunFolder
from trainer.run.progress import Progress
from trainer.run.selection import best_score
from trainer.run.stop import StopSignal
from trainer.run.tracking import Tracker, system_metrics
from trainer.sources.batch_source import BatchSource

log = logging.getLogger(__name__)


class WeightsDifferError(RuntimeError):
    """The engine's log-probs are too far from the learner's: the two do not hold the same weights."""


class TrainingRun:
    """One run from its first step (or the one after its checkpoint) to its last."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        source: BatchSource,
        learners: LearnerGroup,
        tracker: Tracker,
        progress: Progress,
        stop: StopSignal,
        done: int,
    ) -> None:
        self.config = config
        self.folder = folder
        self.source = source
        self.learners = learners
        self.tracker = tracker
        self.progress = progress
        self.stop = stop
        self.done = done
        self.failed_saves = 0
        self.last_save = {"time/checkpoint_s": 0.0, "checkpoint/failed_saves": 0.0}
        self._step_started = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that remain (steps count from 1); ends early when the user asks to stop."""
        options = self.config.eval
        if self.done == 0 and options.every and options.at_start and not self.stop.requested:
            self.tracker.log(0, self._evaluate())
        for step in self.stop.steps(range(self.done + 1, self.config.steps + 1)):
            self._step_started = time.perf_counter()
            yield step

    def record(self, step: int, batch: StepBatch, metrics: dict[str, float]) -> None:
        """Log a finished step; evaluate and save a checkpoint when one is due.

        Raises:
            WeightsDifferError: `policy/logp_gap` is above `rollout.max_logprob_gap`.
            DiskFullError: a checkpoint did not fit on the disk, and no later save can make up for it.
        """
        metrics["time/step_s"] = time.perf_counter() - self._step_started
        self._check_gap(metrics)
        if _due(self.config.eval.every, step, step == self.config.steps):
            metrics |= self._evaluate()
        best = self._best(metrics)
        if best is not None:
            metrics["checkpoint/score"] = best.value
        # Logged before the checkpoint: after a crash in between, the run resumes from an older one and drops this line.
        row = self.tracker.log(step, metrics | self.last_save | system_metrics())
        count = self.config.tracking.completions_per_step
        self.tracker.log_completions(step, batch.groups, count, self.learners.kl_to_reference)
        last = step == self.config.steps or self.stop.requested
        if _due(self.config.checkpoint.every, step, last) or last:
            self.last_save = self._save(step, best)
        self.progress.advance(row)

    def _evaluate(self) -> dict[str, float]:
        self.progress.phase("evaluation")
        return self.source.evaluate(self.learners)

    def _best(self, metrics: dict[str, float]) -> checkpoint.Best | None:
        options = self.config.checkpoint
        return best_score(metrics, options.best_metric, options.best_mode, options.kl_coef, options.max_kl)

    def _save(self, step: int, best: checkpoint.Best | None) -> dict[str, float]:
        """Save a checkpoint. If the disk is full, older ones stay, the run goes on, and the next save tries again."""
        self.progress.phase("checkpoint")
        started = time.perf_counter()
        options = self.config.checkpoint
        state = {"step": step, "source": self.source.state_dict()}
        begun = False
        try:
            checkpoint.check_disk_space(self.folder.checkpoints, step)
            begun = True
            checkpoint.save(
                self.folder.checkpoints, step, self.learners.save, state, keep_last=options.keep_last, best=best
            )
        except checkpoint.DiskFullError as error:
            # If one of several learners failed, the others still wait for it inside the save: they cannot go on.
            stuck = begun and self.config.learner.processes > 1
            if stuck or step == self.config.steps or self.stop.requested:
                raise
            self.failed_saves += 1
            log.error("%s. The run goes on and tries again after %d steps.", error, options.every)
        return {"time/checkpoint_s": time.perf_counter() - started, "checkpoint/failed_saves": float(self.failed_saves)}

    def _check_gap(self, metrics: dict[str, float]) -> None:
        limit, gap = self.config.rollout.max_logprob_gap, metrics.get("policy/logp_gap")
        if limit is not None and gap is not None and gap > limit:
            raise WeightsDifferError(
                f"policy/logp_gap is {gap:.3g} nats per token, but rollout.max_logprob_gap is {limit:g}: the engine "
                "samples from other weights than the learner trains, or computes in lower precision. Give "
                "rollout.dtype and model.dtype the same value, or raise the limit"
            )


def _due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def resume(folder: RunFolder, source: BatchSource, learners: LearnerGroup) -> int:
    """Load the newest complete checkpoint, and return its step.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    found = checkpoint.latest(folder.checkpoints)
    for message in found.messages:
        log.warning("%s", message)
    learners.load(Path(found.path))
    source.load_state_dict(found.state["source"])
    source.sync_weights(learners, version=found.step)
    return found.step
