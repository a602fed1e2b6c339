"""The frozen reference model of a KL term: syncs it to the policy, saves and loads it, and applies it to samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmquest_rl.algorithms.ratios import mean_of_sequence, totals
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.models.base import Model, image_format
from llmquest_rl.models.weight_map import named_weights
from trainer.learner.microbatches import add_logprobs, plan_microbatches
from trainer.learner.setup import LearnerSetup
from trainer.run.samples import Sample

FILE = "reference.pt"


@torch.no_grad()
def sync_reference(reference: Model, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the policy's weights, given by our names, into the reference."""
    ours = dict(named_weights(reference))
    for name, weight in weights:
        ours[name].copy_(weight)


def save_reference(reference: Model, folder: Path) -> None:
    """Write the reference's weights."""
    torch.save(dict(named_weights(reference)), folder / FILE)


def load_reference(reference: Model, folder: Path) -> None:
    """Load the weights that `save_reference` wrote."""
    sync_reference(reference, torch.load(folder / FILE, map_location="cpu", weights_only=True).items())


def numbered_group(number: int, sample: Sample) -> SequenceGroup:
    """The sequence group of one sample, with its number (from 1) as the token field `numbers`."""
    problem = sample.group.problem
    images = None if problem.images is None else torch.from_numpy(problem.images)
    group = SequenceGroup(problem.prompt_ids, [sample.completion.token_ids], images=images)
    return group.with_constants("numbers", [float(number)])


def completion_logprobs(
    reference: Model, groups: Sequence[SequenceGroup], setup: LearnerSetup, device: torch.device
) -> dict[int, float]:
    """Log-probs of completions under the reference, summed over their tokens, by number. A collective call.

    Args:
        reference: the reference model.
        groups: this process's share of numbered groups; there may be none.
        setup: token budget and temperature.
        device: device of the model.
    """
    [plan] = plan_microbatches([groups], setup.tokens_per_microbatch, image_format(reference.config))
    [batches] = add_logprobs([plan], "ref_logprobs", reference, setup.objective.temperature, device, False)
    found: dict[int, float] = {}
    for batch in batches:
        numbers = mean_of_sequence(batch.token_fields["numbers"].double(), batch.sequence_ids)
        sums = totals(batch.token_fields["ref_logprobs"].double(), batch.sequence_ids)
        found |= zip(numbers.long().tolist(), sums.tolist(), strict=True)
    return found
