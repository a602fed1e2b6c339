"""Work with a frozen teacher, of which every learner process holds all: scores and distributions for a student."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import TypeVar

import torch
from torch import nn

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.layers.soft_targets import top_tokens
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import read_shape
from llmquest_rl.packing import pack
from llmquest_rl.soft_targets import TopTokens, joined
from trainer.learner.build_models import load_frozen
from trainer.learner.microbatches import split_to_budget, target_logprobs
from trainer.learner.setup import LearnerSetup

Row = TypeVar("Row")
Minibatches = Sequence[Sequence[SequenceGroup]]


def with_hinted_logprobs(minibatches: Minibatches, teacher: nn.Module | None, setup: LearnerSetup) -> Minibatches:
    """If the teacher reads hints, the groups with the field `ref_logprobs`: log-probs given their `reference_prompt`.
    A collective call.

    Otherwise the groups themselves; the teacher then scores the packed microbatches.
    """
    described = setup.objective.teacher
    if described is None or described.hint is None or described.in_engine:
        return minibatches
    assert isinstance(teacher, CausalLM), "a teacher predicts tokens"
    groups = [
        replace(group, prompt=group.reference_prompt or group.prompt, token_fields={}, reference_prompt=None)
        for group in chain.from_iterable(minibatches)
    ]
    scores = iter(target_logprobs(groups, teacher, teacher, setup))
    return [
        [group.with_target_values("ref_logprobs", next(scores).tolist()) for group in minibatch]
        for minibatch in minibatches
    ]


def with_distributions(batch: TokenBatch, teacher: nn.Module | None, setup: LearnerSetup) -> TokenBatch:
    """A microbatch on the teacher's device with its distributions, if the objective wants them."""
    described = setup.objective.teacher
    if described is None or not described.gives_distributions or teacher is None:
        return batch
    assert isinstance(teacher, CausalLM), "a teacher predicts tokens"
    return replace(batch, soft_targets=teacher.distributions(batch))


class TopTokenScorer:
    """The methods of a learner that make the cache of a teacher's most likely tokens."""

    setup: LearnerSetup
    device: torch.device
    cached_teacher: CausalLM | None = None
    """The teacher while the cache is made."""

    def top_tokens(self, groups: Sequence[SequenceGroup]) -> list[list[TopTokens]]:
        """The teacher's most likely tokens at every token of each completion: `[groups][completions]`, on the CPU.

        The teacher is loaded at the first call, and stays until `forget_teacher`.
        """
        described, path = self.setup.objective.teacher, self.setup.reference_path
        assert described is not None and path is not None, "only a teacher with a folder has a cache"
        if self.cached_teacher is None:
            self.cached_teacher = load_frozen(path, self.setup)
        vocab_size = read_shape(self.setup.model_path)[1].vocab_size
        return _top_tokens(groups, self.cached_teacher, described.top_k, vocab_size, self.setup, self.device)

    def forget_teacher(self) -> None:
        """Free the teacher's memory."""
        self.cached_teacher = None


def _top_tokens(
    groups: Sequence[SequenceGroup], teacher: CausalLM, k: int, vocab: int, setup: LearnerSetup, device: torch.device
) -> list[list[TopTokens]]:
    def compute(batch: TokenBatch) -> Callable[[slice], TopTokens]:
        return top_tokens(teacher.distributions(batch), k, vocab).to("cpu").rows

    found = zip(_of_completions(groups, teacher, setup, device, compute), _masks(groups), strict=True)
    remaining = iter([_at_targets(tokens, mask) for tokens, mask in found])
    return [[next(remaining) for _ in group.completions] for group in groups]


def _at_targets(tokens: TopTokens, mask: list[bool]) -> TopTokens:
    """The rows of the targets, with blank rows where the mask leaves a token out."""
    rows = torch.tensor(mask, dtype=torch.long).cumsum(0) * torch.tensor(mask, dtype=torch.long)
    return joined([tokens.blank(1), tokens]).rows(rows.tolist())


def _masks(groups: Sequence[SequenceGroup]) -> list[list[bool]]:
    """True for the targets among the tokens of each completion."""
    return [mask for group in groups for mask in group.targets]


@torch.no_grad()
def _of_completions(
    groups: Sequence[SequenceGroup],
    teacher: CausalLM,
    setup: LearnerSetup,
    device: torch.device,
    compute: Callable[[TokenBatch], Callable[[slice], Row]],
) -> list[Row]:
    """What `compute` gives for the targets of each completion, in the order of the groups.

    Args:
        compute: for a packed batch, a function from a slice of its targets to their values.
    """
    budget = setup.tokens_per_microbatch
    parts = split_to_budget(groups, budget, teacher.shares_prompts, needs_whole_group=0)
    numbers = {id(part): i for i, part in enumerate(parts)}
    found: dict[int, list[Row]] = {}
    for packed in pack(parts, budget):
        values, start = compute(collate(packed).to(device)), 0
        for part in packed:
            ends = list(accumulate(map(sum, part.targets), initial=start))
            found[numbers[id(part)]] = [values(slice(a, b)) for a, b in pairwise(ends)]
            start = ends[-1]
    return [row for i in range(len(parts)) for row in found[i]]
