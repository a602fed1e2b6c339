"""Groups that are too large for a microbatch are cut into their completions, with the same result."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.objectives import Loss
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.types import ImageFormat
from tests.trainer.learner.learner_cases import POLICY, make_folder, make_setup, minibatches, whole_weights
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner
from trainer.learner.microbatches import idle_group

PROMPT, LONGEST = 4, 11
"""Tokens in a prompt, and in the longest completion, of `minibatches`."""
BATCHES: list[TokenBatch] = []
"""The microbatches that a `Watched` objective was given."""


class Watched(Policy):
    """Keeps the batches whose loss it computes."""

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        BATCHES.append(batch)
        return super().loss(model, batch)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    BATCHES.clear()
    yield
    BATCHES.clear()


def trained(folder: Path, tokens_per_microbatch: int, stage: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after two steps of two updates and two epochs, with old and reference log-probs."""
    objective = Watched(POLICY.algorithm, POLICY.temperature, POLICY.max_tokens)
    learner_config = LearnerConfig.model_validate({"zero_stage": stage, "timeout_s": 60})
    setup = make_setup(folder, objective=objective, learner=learner_config, tokens_per_microbatch=tokens_per_microbatch)
    with closing(Learner(setup)) as learner:
        for step in range(2):
            metrics = learner.update(minibatches(step), 2)
        return whole_weights(learner), metrics


def num_completions(batch: TokenBatch) -> int:
    return len(batch.sequence_ids.unique())


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [PROMPT + LONGEST, PROMPT + LONGEST - 3])
def test_a_group_beyond_the_budget_is_cut_and_nothing_else_changes(tmp_path: Path, stage: int, budget: int) -> None:
    """The smaller budget does not hold every completion: one that is too long is computed alone."""
    folder = make_folder(tmp_path / "model")
    expected, whole = trained(folder, 10_000, stage)
    groups = [
        sequence_group.num_tokens
        for step in range(2)
        for sequence_groups in minibatches(step)
        for sequence_group in sequence_groups
    ]
    assert max(len(batch.tokens) for batch in BATCHES) > max(groups) > PROMPT + LONGEST, "groups were computed whole"

    BATCHES.clear()
    weights, cut = trained(folder, budget, stage)
    over = [batch for batch in BATCHES if len(batch.tokens) > budget]
    assert all(num_completions(batch) == 1 for batch in over)
    assert bool(over) == (budget < PROMPT + LONGEST)
    assert max(map(num_completions, BATCHES)) > 1, "short completions still share a microbatch"
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)
    for name in ("learner/grad_norm", "policy/loss", "policy/kl", "policy/ratio", "policy/tokens"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7), name


def test_a_group_within_the_budget_stays_whole(tmp_path: Path) -> None:
    """Its prompt is computed once: three completions of one prompt fit where three prompts would not."""
    group = SequenceGroup([7, 8, 9, 10], [[1, 2], [3, 4], [5, 6]])
    token_fields = {"advantages": [[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]], "rollout_logprobs": [[-5.0, -5.0]] * 3}
    [sequence_group] = POLICY.assign_token_weights([SequenceGroup(group.prompt, group.completions, token_fields)])
    objective = Watched(POLICY.algorithm, POLICY.temperature, POLICY.max_tokens)
    setup = make_setup(
        make_folder(tmp_path / "model"), objective=objective, tokens_per_microbatch=sequence_group.num_tokens
    )
    with closing(Learner(setup)) as learner:
        learner.update([[sequence_group]], 1)
    assert [num_completions(batch) for batch in BATCHES] == [3]
    assert len(BATCHES[0].tokens) <= sequence_group.num_tokens < 3 * len(group.prompt)


@pytest.mark.parametrize("token_id", [0, 7])
def test_an_idle_group_has_an_image_only_if_another_process_has_one(token_id: int) -> None:
    """Without one it must not have an image token either."""
    images = ImageFormat(token_id, tokens=3, channels=1, height=4, width=6)
    text = idle_group(["weights"], images)
    assert text.images is None and token_id not in text.prompt
    blank = idle_group(["weights"], images, with_image=True)
    assert blank.images is not None and blank.images.shape == (1, 1, 4, 6) and blank.prompt == [token_id] * 3
