"""The trained model of a run: its place, and copies of it."""

import json
import logging
import shutil
from pathlib import Path

from llmquest_rl.models.config.labels import POOLING
from trainer.run import checkpoint
from trainer.run.folder import RunFolder, check_new_folder

log = logging.getLogger(__name__)

MODEL = "model"
"""Name of the folder inside a checkpoint that holds the model in the Hub's layout."""


def trained_model(run: str, which: str = "latest") -> Path:
    """The Hub folder inside a run's checkpoint.

    Args:
        run: a run folder, `runs/<name>` or `runs/latest`.
        which: `latest`, `best`, or the number of a step.

    Raises:
        RunFolderError: there is no such run.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ValueError: `which` is none of these.
    """
    folder = RunFolder.open(run)
    if which == "latest":
        return checkpoint.latest(folder.checkpoints).path / MODEL
    if which == "best":
        path = checkpoint.best_checkpoint(folder.checkpoints)
        if path is None:
            raise checkpoint.CheckpointError(
                f"{folder.checkpoints}: no checkpoint has a value of checkpoint.best_metric (or its KL is above "
                "checkpoint.max_kl), so none is the best: give `latest` or the number of a step"
            )
        return path / MODEL
    if not which.isdecimal():
        raise ValueError(f"checkpoint {which!r}: expected `latest`, `best` or the number of a step")
    path = folder.checkpoints / f"step-{int(which):06d}"
    if not path.is_dir():
        saved = ", ".join(sorted(entry.name for entry in folder.checkpoints.glob("step-*"))) or "none"
        raise checkpoint.CheckpointError(f"{path}: there is no such checkpoint; saved checkpoints: {saved}")
    return checkpoint.load(path).path / MODEL


def newest_step(run: RunFolder) -> int | None:
    """The step of a run's newest complete checkpoint; None = it has none. A run has ended if this is its last step."""
    try:
        return checkpoint.latest(run.checkpoints).step
    except checkpoint.CheckpointError:
        return None


def export(run: str, out: Path, which: str = "latest") -> Path:
    """Copy the trained model of a run into the folder `out`, which transformers, vLLM and the Hub can load.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ValueError: `out` exists and is not empty.
    """
    check_new_folder(out)
    shutil.copytree(trained_model(run, which), out, dirs_exist_ok=True)
    if json.loads((out / "config.json").read_text(encoding="utf-8")).get(POOLING) == "mean":
        log.warning(
            "%s: its score is the mean over the tokens of a reply (%s in config.json). transformers and vLLM do not "
            "know this field: they read the last token and give other scores. `reward_models` of a recipe honours it.",
            out,
            POOLING,
        )
    return out
