"""The training loop of every objective: pretraining, SFT, RL and the rest."""

from pathlib import Path

from trainer.assemble import assemble
from trainer.config.schema import Config


def train(config: Config, resume: Path | None = None, replay: Path | None = None) -> Path:
    """Train as configured; returns the run folder.

    Args:
        config: the resolved configuration.
        resume: a run folder to continue from its newest complete checkpoint.
        replay: a folder of saved rollouts to train on instead of sampling.

    Raises:
        ValueError, ClusterError: the run cannot start (see `assemble`).
        WeightsDifferError, TooManySkippedUpdatesError, DiskFullError: it cannot go on; the last checkpoint is complete.
    """
    with assemble(config, resume, replay) as (run, source, learners):
        for step in run.steps():
            batch = source.next(step)
            metrics = learners.update(batch)
            metrics |= source.sync_weights(learners, version=step)
            run.record(step, batch, metrics)
    return run.folder.path
