"""A learner: one process that trains, around a DeepSpeed engine (`distributed.py`).

The objective's loss is a sum whose weights already carry the mean over the whole update, so gradients are summed over
microbatches and processes, never averaged. DeepSpeed averages over processes, so the loss is scaled by their number.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.layers.moe.routing_replay import replay_routing
from llmquest_rl.metrics import Metrics
from llmquest_rl.models.base import CausalLM, ClassifierModel, image_format
from llmquest_rl.models.checkpoint.load_save import save_model
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.optim.schedules import lr_factor
from rollout.weights import WeightSnapshot, take_snapshot
from trainer.learner.build_models import build_model, build_reference
from trainer.learner.critic import Critic
from trainer.learner.distributed import (
    apply_gradients,
    forget_accelerate,
    join_group,
    leave_process_group,
    over_processes,
    peak_memory_gb,
    sum_over_processes,
    trainable,
    whole_weights,
)
from trainer.learner.microbatches import (
    Plan,
    add_logprobs,
    loss_and_changes,
    num_tokens,
    plan_microbatches,
    split_to_budget,
    target_logprobs,
)
from trainer.learner.reference import load_reference, save_reference, sync_reference
from trainer.learner.setup import LearnerSetup
from trainer.learner.state import SkippedUpdates, load_rng, save_rng, seed_everything
from trainer.learner.teacher import TopTokenScorer, with_distributions, with_hinted_logprobs

log = logging.getLogger(__name__)

TAG = "learner"
"""Name of DeepSpeed's folder inside a checkpoint."""


class Learner(TopTokenScorer):
    """One learner process: it holds the model and its optimizer, and trains on its share of every minibatch.

    The cluster makes it a Ray actor; with `cluster: inline` it runs in the caller's process. Every method is a
    collective: all processes call it, in the same order.
    """

    def __init__(
        self, setup: LearnerSetup, rank: int = 0, world_size: int = 1, master_address: str = "", master_port: int = 0
    ) -> None:
        """Join the group at `master_address:master_port` (one process needs none), load the model, build the optimizer.

        Raises:
            ValueError: the model folder is incomplete or damaged.
        """
        self.setup, self.rank, self.world_size = setup, rank, world_size
        self.device = torch.device(setup.device)
        self.dtype = getattr(torch, setup.dtype)
        self.steps = self.updates = 0
        self.skipped_updates = SkippedUpdates(setup.learner.max_skipped_updates)
        self._set_threads()
        os.environ.setdefault("DS_ACCELERATOR", setup.device)
        self._owns_group = join_group(
            self.device, rank, world_size, master_address, master_port, setup.learner.timeout_s
        )
        seed_everything(setup.seed, rank)
        model = build_model(setup)
        model.gradient_checkpointing = setup.gradient_checkpointing
        self.reference = build_reference(setup)
        self.engine, self.adamw = trainable(model, setup.optimizer.lr, setup, rank, world_size)
        self.model: CausalLM | ClassifierModel = self.engine.module
        self.critic = Critic(setup, rank, world_size) if setup.objective.critic is not None else None

    def update(self, minibatches: Sequence[Sequence[SequenceGroup]], epochs: int) -> dict[str, float]:
        """Run one optimizer update for each minibatch, in each epoch.

        Args:
            minibatches: this process's share of every minibatch, with the token weights of the whole minibatch.
            epochs: passes over the minibatches.

        Returns:
            Metrics over all processes, the same on each.

        Raises:
            TooManySkippedUpdatesError: more than `max_skipped_updates` updates in a row were skipped; the message names
                the saved batch.
        """
        self._set_threads()
        self.model.train()
        started = time.perf_counter()
        plan = self._plan(minibatches, updates=len(minibatches) * epochs)
        prepared = time.perf_counter()
        metrics = Metrics()
        for _ in range(epochs):
            for microbatches, sequence_groups in zip(plan, minibatches, strict=True):
                self._update_once(microbatches, sequence_groups, metrics)
        self.steps += 1
        every = self.setup.objective.ref_sync_interval
        if self.reference is not None and every is not None and self.steps % every == 0:
            sync_reference(self.reference, whole_weights(self.engine))
        metrics.max("time/learner_prepare_s", prepared - started)
        metrics.max("time/learner_update_s", time.perf_counter() - prepared)
        metrics.sum("learner/tokens", epochs * num_tokens(plan))
        metrics.max("learner/microbatches", epochs * sum(map(len, plan)))
        metrics.max("learner/lr", self.adamw.param_groups[0]["lr"])
        metrics.max("learner/updates", self.updates)
        metrics.max("learner/skipped_updates", self.skipped_updates.total)
        metrics.max("memory/learner_peak_gb", peak_memory_gb(self.device))
        return over_processes(metrics).to_floats(self.setup.objective.derived_metrics)

    def _update_once(
        self, microbatches: list[TokenBatch], sequence_groups: Sequence[SequenceGroup], metrics: Metrics
    ) -> None:
        options = self.setup.optimizer
        factor = lr_factor(
            options.schedule, self.updates, self.setup.total_updates, options.warmup_steps, options.min_lr_ratio
        )
        for group in self.adamw.param_groups:
            group["lr"] = options.lr * factor
        if self.critic is not None:
            self.critic.update(microbatches, factor, metrics)
        parts = []
        for i, microbatch in enumerate(microbatches):
            self.engine.set_gradient_accumulation_boundary(i == len(microbatches) - 1)
            batch = microbatch.to(self.device)
            if self.setup.objective.teacher is not None:
                batch = with_distributions(batch, self.reference, self.setup)
            with replay_routing(self.model, batch.experts if self.setup.objective.routing_replay else None):
                loss = loss_and_changes(self.setup.objective, self.engine, batch)
                # A loss that is not finite can have a finite gradient: with NaN every process skips the update.
                poison = torch.where(loss.value.isfinite(), 1.0, torch.nan)
                self.engine.backward(loss.value * (poison * self.world_size), scale_wrt_gas=False)
            parts.append(loss.metrics)
        norm = apply_gradients(self.engine, options.max_grad_norm)
        routing = self.model.after_update(norm is not None, dist.all_reduce)
        self.updates += 1
        if norm is None:
            self.skipped_updates.record_skipped(
                self.updates, sequence_groups, self.setup.folder / f"skipped_update{self.updates}_rank{self.rank}.pt"
            )
            return
        self.skipped_updates.in_a_row = 0
        metrics.merge(parts)
        metrics.mean("learner/grad_norm", norm)
        for name, value in routing.items():
            metrics.mean(name, value)

    def _plan(self, minibatches: Sequence[Sequence[SequenceGroup]], updates: int) -> Plan:
        """The microbatches of these updates, with the log-probs of old policy and reference that they need."""
        objective, budget = self.setup.objective, self.setup.tokens_per_microbatch
        if objective.teacher is not None:
            minibatches = with_hinted_logprobs(minibatches, self.reference, self.setup)
        shares_prompts = self.model.shares_prompts and (self.reference is None or self.reference.shares_prompts)
        fitted = [
            split_to_budget(sequence_groups, budget, shares_prompts, objective.needs_whole_group)
            for sequence_groups in minibatches
        ]
        plan = plan_microbatches(fitted, budget, image_format(self.model.config))
        models: dict[str, nn.Module | None] = {"old_logprobs": self.engine, "ref_logprobs": self.reference}
        for name in objective.computed_logprobs(updates):
            model = models[name]
            if all(name in batch.token_fields for microbatches in plan for batch in microbatches):
                continue
            assert model is not None, f"the objective needs {name}, but no reference model"
            plan = add_logprobs(plan, name, model, objective.temperature, self.device, model is self.engine)
        if self.critic is not None:
            plan = self.critic.add_values(plan)
        all_reduce = partial(sum_over_processes, device=self.device)
        return [objective.with_shared_values(microbatches, all_reduce) for microbatches in plan]

    @torch.no_grad()
    def evaluate(self, sequence_groups: Sequence[SequenceGroup]) -> dict[str, float]:
        """Compute the objective's metrics on this process's share of held-out data, without a gradient.

        Returns:
            Metrics named `eval/...` over all processes, the same on each.
        """
        self._set_threads()
        self.model.eval()
        plan = self._plan([sequence_groups], updates=1)
        metrics = Metrics()
        for batch in (microbatch.to(self.device) for microbatch in plan[0]):
            if self.setup.objective.teacher is not None:
                batch = with_distributions(batch, self.reference, self.setup)
            metrics.merge([self.setup.objective.loss(self.engine, batch).metrics])
        floats = over_processes(metrics).to_floats(self.setup.objective.derived_metrics)
        return {f"eval/{name.partition('/')[2]}": value for name, value in floats.items()}

    @torch.no_grad()
    def logprobs(self, groups: Sequence[SequenceGroup], of_reference: bool = False) -> list[Tensor]:
        """Log-probs of the targets of this process's groups, `[targets]` each: of the model, or of the reference."""
        self._set_threads()
        self.model.eval()
        model = self.reference if of_reference else self.model
        assert model is not None, "`LearnerGroup.has_reference` says whether there is one"
        return target_logprobs(groups, model, model if of_reference else self.engine, self.setup)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs (name on disk, tensor) of the current weights. Every process must exhaust the iterator.

        With ZeRO-3 one tensor at a time is gathered. Otherwise the tensors are the live parameters, so read them before
        the next update.
        """
        return disk_tensors(self.model, whole_weights(self.engine))

    def weight_snapshot(self) -> WeightSnapshot:
        """The weights in host memory with their checksums, on the first process; an empty one on the others."""
        if self.rank == 0:
            return take_snapshot(self.weights())
        deque(self.weights(), maxlen=0)
        return WeightSnapshot({}, {})

    def save(self, folder: Path) -> None:
        """Write the state for an exact resume into an existing folder."""
        state = {"steps": self.steps, "updates": self.updates, **self.skipped_updates.state_dict()}
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)
        if self.critic is not None:
            self.critic.save(folder)
        save_rng(folder / TAG / f"rng_{self.rank}.pt")
        if self.rank == 0 and self.reference is not None and self.setup.objective.ref_sync_interval is not None:
            save_reference(self.reference, folder / TAG)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote, with the same number of processes, ZeRO stage and dtype.

        Raises:
            ValueError: the folder has no such checkpoint, or the number of processes, the stage or the dtype differs.
        """
        saved = len(list((folder / TAG).glob("rng_*.pt")))
        if saved != self.world_size:
            raise ValueError(
                f"{folder / TAG} was written by {saved} learner processes, but this run has {self.world_size}: "
                "set learner.processes to the same number, or start from an exported model instead"
            )
        path, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(
                f"{folder / TAG} is not a checkpoint of this ZeRO stage and dtype: set learner.zero_stage and "
                "model.dtype as in the run that wrote it"
            )
        self.steps, self.updates = state["steps"], state["updates"]
        if self.reference is not None and self.setup.objective.ref_sync_interval is not None:
            load_reference(self.reference, folder / TAG)
        if self.critic is not None:
            self.critic.load(folder)
        self.skipped_updates.load_state_dict(state)
        load_rng(folder / TAG / f"rng_{self.rank}.pt")

    def export(self, folder: Path) -> None:
        """Write the weights as a folder of the Hub's layout, tokenizer included."""
        if self.rank == 0:
            save_model(self.setup.model_path, self.weights(), folder, config_fields=self.model.config_fields)
        else:
            deque(self.weights(), maxlen=0)
        dist.barrier()

    def close(self) -> None:
        """Leave the group and free the model. Idempotent."""
        if not hasattr(self, "engine"):
            return
        if self.critic is not None:
            self.critic.close()
        self.engine.destroy()
        del self.critic, self.engine, self.model, self.adamw, self.reference
        forget_accelerate()
        if self._owns_group and dist.is_initialized():  # closing a vLLM engine here may have ended every group
            leave_process_group()

    def _set_threads(self) -> None:
        """Set the thread count before each piece of work, because an engine in this process may have changed it."""
        if self.setup.threads:
            torch.set_num_threads(self.setup.threads)
