"""Builds the models of a learner: the one that it trains, and the frozen reference."""

from pathlib import Path

import torch

from llmquest_rl.models.base import CausalLM, ClassifierModel
from llmquest_rl.models.checkpoint.load_classifier import load_classifier, new_classifier
from llmquest_rl.models.checkpoint.load_save import load_model, new_model
from trainer.learner.setup import LearnerSetup


def build_model(setup: LearnerSetup) -> CausalLM | ClassifierModel:
    """The model to train, with its initial weights."""
    path, labels, seed = setup.model_path, setup.objective.labels, setup.seed
    dtype, device = getattr(torch, setup.dtype), torch.device(setup.device)
    is_new = setup.init == "random"
    if labels:
        build = new_classifier if is_new else load_classifier
        return build(path, labels, dtype, device, seed, setup.objective.pooling)
    return new_model(path, dtype, device, seed) if is_new else load_model(path, dtype, device)


def build_reference(setup: LearnerSetup) -> CausalLM | ClassifierModel | None:
    """The frozen model that the objective compares with: a teacher, or a copy of the initial model; None = it needs no
    other model.

    Every process holds all of it, with any ZeRO stage: nothing of it is partitioned.
    """
    if not setup.objective.needs_reference:
        return None
    path = setup.reference_path
    return build_model(setup).eval().requires_grad_(False) if path is None else load_frozen(path, setup)


def load_frozen(path: Path, setup: LearnerSetup) -> CausalLM:
    """A language model that is not trained, in the learner's dtype and on its device."""
    return load_model(path, getattr(torch, setup.dtype), setup.device).eval().requires_grad_(False)
