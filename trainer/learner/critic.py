"""The critic of PPO: a scorer that gives every token a value, trained beside the policy in the learner process.

It has a DeepSpeed engine and AdamW state of its own, with the ZeRO stage and dtype of the policy. Both are in the
learner's checkpoints, so that a run resumes exactly.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import TokenBatch
from llmquest_rl.metrics import Metrics
from llmquest_rl.models.base import ClassifierModel
from llmquest_rl.models.checkpoint.hub import check_model_files
from llmquest_rl.models.checkpoint.load_classifier import check_classifier, load_classifier, new_classifier
from llmquest_rl.models.checkpoint.load_save import read_shape
from trainer.learner.check_teacher import check_same_tokens
from trainer.learner.distributed import apply_gradients, trainable
from trainer.learner.microbatches import Plan
from trainer.learner.setup import LearnerSetup

TAG = "critic"
"""Name of DeepSpeed's folder inside a checkpoint."""
LABELS = ("value",)


def check_critic(model_path: Path, critic_path: Path | None) -> None:
    """Check that the critic can be made of its model, without reading a weight.

    Raises:
        ValueError: a file is missing, the model cannot be turned into a scorer, or it has another tokenizer.
    """
    if critic_path is None:
        check_classifier(model_path, LABELS)
        return
    check_model_files(critic_path)
    check_classifier(critic_path, LABELS)
    remedy = "The critic reads the model's token ids, so give a model with the same tokenizer"
    check_same_tokens(f"objective.critic.path: {critic_path}", critic_path, model_path, remedy)


def _holds_scorer(path: Path) -> bool:
    hf, shape = read_shape(path)
    return issubclass(hf.model, ClassifierModel) and len(shape.labels) == len(LABELS)


class Critic:
    """A model with one number per token, and its optimizer. Every method but `close` is a collective."""

    def __init__(self, setup: LearnerSetup, rank: int, world_size: int) -> None:
        """Load the model. The head is new, and 0, unless the folder holds a scorer, such as a reward model: values of 0
        are no baseline yet, while those of a random head would be noise in every advantage."""
        options = setup.objective.critic
        assert options is not None, "the objective has a critic"
        self.setup, self.world_size, self.options = setup, world_size, options
        self.device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        path = setup.critic_path or setup.model_path
        build = new_classifier if setup.init == "random" and setup.critic_path is None else load_classifier
        model = build(path, LABELS, dtype, self.device, setup.seed)
        model.gradient_checkpointing = setup.gradient_checkpointing
        if not _holds_scorer(path):
            for weight in model.get_submodule(model.new_head).parameters():
                nn.init.zeros_(weight)
        self.engine, self.adamw = trainable(model, options.lr, setup, rank, world_size)
        self.model: ClassifierModel = self.engine.module

    @torch.no_grad()
    def add_values(self, plan: Plan) -> Plan:
        """The plan with the token field `values`: the critic's values of the states before the targets."""

        def with_values(batch: TokenBatch) -> TokenBatch:
            values: Tensor = self.engine(batch.to(self.device)).values[:, 0]
            return replace(batch, token_fields={**batch.token_fields, "values": values.to("cpu", torch.float32)})

        return [[with_values(batch) for batch in microbatches] for microbatches in plan]

    def update(self, microbatches: Sequence[TokenBatch], lr_factor: float, metrics: Metrics) -> None:
        """Run one optimizer update on the microbatches of one update of the policy."""
        for group in self.adamw.param_groups:
            group["lr"] = self.options.lr * lr_factor
        parts = []
        for i, microbatch in enumerate(microbatches):
            self.engine.set_gradient_accumulation_boundary(i == len(microbatches) - 1)
            loss = self.setup.objective.value_loss(self.engine, microbatch.to(self.device))
            poison = torch.where(loss.value.isfinite(), 1.0, torch.nan)  # as for the policy
            self.engine.backward(loss.value * (poison * self.world_size), scale_wrt_gas=False)
            parts.append(loss.metrics)
        norm = apply_gradients(self.engine, self.setup.optimizer.max_grad_norm)
        self.model.after_update(norm is not None, dist.all_reduce)
        metrics.sum("learner/critic_skipped_updates", float(norm is None))
        if norm is None:
            return
        metrics.merge(parts)
        metrics.mean("learner/critic_grad_norm", norm)

    def save(self, folder: Path) -> None:
        """Write the state for an exact resume into an existing folder."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            ValueError: the checkpoint has no critic.
        """
        if not (folder / TAG).is_dir():
            raise ValueError(f"{folder} has no critic: a run with another algorithm wrote it, so start a new run")
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, "the checkpoint of the policy has the same ZeRO stage and dtype, and was loaded before"

    def close(self) -> None:
        """Free the model."""
        self.engine.destroy()
        del self.engine, self.model, self.adamw
