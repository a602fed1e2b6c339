"""Distillation against its equations in float64: on-policy with the oracle of the policy loss, offline as sums."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.hint import hinted_prompt
from llmquest_rl.data.rows import DataError, Row
from llmquest_rl.layers import soft_targets
from llmquest_rl.layers.soft_targets import logprobs_and_kl, top_tokens
from llmquest_rl.loader import ComponentError
from llmquest_rl.models.base import Output
from llmquest_rl.objectives.distill import Config, Offline, OnPolicy, Teacher, build
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.soft_targets import SoftTargets, TeacherHead, TopTokens
from llmquest_rl.types import Completion, Group, Problem, Sampling, Score
from tests.algorithms import oracle
from tests.algorithms.cases import MAX_TOKENS, batch_of, random_case

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROWS = {
    "on-policy distillation": ("reinforce", {"aggregation": "token_mean"}),
    "with a ratio": ("reinforce", {"surrogate": "clip", "aggregation": "sequence_mean"}),
    "to the engine": ("reinforce", {"surrogate": "clipped_weight", "old_policy": "engine"}),
    "limited": ("reinforce", {"advantage_limit": 0.3, "is_correction": "token_mask"}),
}


# --- on-policy ---


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("seed", range(3))
def test_on_policy_loss_and_gradient_equal_the_equations(row: str, seed: int) -> None:
    """The oracle gets log pi_teacher - log pi_old as the advantage of each token."""
    algorithm = resolve(*ROWS[row])
    case = random_case(seed)
    made = OnPolicy(Policy(algorithm, 1.0, MAX_TOKENS), Teacher("teacher"))
    batch = batch_of(made.policy, case)
    leaf = case.new.clone().requires_grad_()
    loss = made.loss_of(Output(leaf, case.entropies, {}), batch)
    loss.value.backward()  # type: ignore[no-untyped-call]

    def expected(new: Any) -> float:
        arrays = (new, case.new.numpy(), case.old.numpy(), case.reference.numpy(), case.entropies.numpy())
        groups = oracle.sequences(case.sequence_groups, *arrays)
        return oracle.loss([[with_gains(s) for s in group] for group in groups], algorithm, MAX_TOKENS)

    def with_gains(s: oracle.Sequence) -> oracle.Sequence:
        old = s.rollout if algorithm.old_policy == "engine" else s.old
        limit = algorithm.advantage_limit or math.inf
        return replace(s, advantages=np.clip(s.reference - old, -limit, limit))

    assert float(loss.value.detach()) == pytest.approx(expected(case.new.numpy()), rel=1e-10)
    assert leaf.grad is not None
    for i in range(len(leaf)):
        step = np.zeros(len(leaf))
        step[i] = 1e-6
        slope = (expected(case.new.numpy() + step) - expected(case.new.numpy() - step)) / 2e-6
        assert float(leaf.grad[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_its_expected_gradient_is_that_of_the_reverse_kl() -> None:
    """Summed over all tokens of a vocabulary of five, each with its probability under the model itself."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(kl(logits, teacher), logits)
    algorithm = resolve("reinforce", {"aggregation": "token_mean", "tis_cap": None})
    made = OnPolicy(Policy(algorithm, 1.0, 1), Teacher("teacher"))
    found = torch.zeros_like(logits)
    for token in range(5):
        own, theirs = (values.log_softmax(-1)[token : token + 1] for values in (logits, teacher))
        group = SequenceGroup([1], [[token]], {"rollout_logprobs": [[0.0]], "weights": [[1.0]]})
        batch = collate([group])
        fields = {name: values.double() for name, values in batch.token_fields.items()}
        batch = replace(batch, token_fields=fields | {"rollout_logprobs": own.detach(), "ref_logprobs": theirs})
        (part,) = torch.autograd.grad(made.loss_of(Output(own, own.detach(), {}), batch).value, logits)
        found += own.detach().exp() * part
    torch.testing.assert_close(found, expected, **EXACT)


def kl(logits: Tensor, teacher: Tensor) -> Tensor:
    own = logits.log_softmax(-1)
    return (own.exp() * (own - teacher.log_softmax(-1))).sum()


def test_every_completion_with_a_token_is_scored_whatever_its_reward() -> None:
    answers = [Completion(ids, [-0.5] * len(ids), "", "stop", 0) for ids in ([3, 4], [], [5])]
    scores = [Score(1.0), Score(0.0), Score(None, failure="timeout")]
    problem = Problem("t/0", "a", [1, 2], None, reference_prompt_ids=[1, 9, 2])
    made = build(Config(hint="{prompt} {answer}"), resolve("reinforce"), Sampling())
    [group], metrics = made.sequence_groups([Group(problem, answers, scores)])
    assert (group.prompt, group.reference_prompt) == ([1, 2], [1, 9, 2])
    assert group.completions == [[3, 4], [5]] and group.token_fields == {"rollout_logprobs": [[-0.5] * 2, [-0.5]]}
    assert metrics.to_floats()["reward/scored_samples"] == 2


# --- offline ---


class Heads:
    """Random output layers of a student and a teacher, in float64."""

    def __init__(self, seed: int, n: int = 7, vocab: int = 11, teacher_vocab: int = 11) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.states, self.weight = draw(n, 4).requires_grad_(), draw(vocab, 4).requires_grad_()
        self.teacher = TeacherHead(draw(n, 6), draw(teacher_vocab, 6), softcap=3.0)
        self.targets = torch.randint(min(vocab, teacher_vocab), (n,), generator=generator)

    def kl(self, teacher: SoftTargets, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
        return logprobs_and_kl(self.states, self.weight, softcap, self.targets, temperature, teacher)

    def probabilities(self, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of the student and of the teacher `[n, vocab]`, all at once."""
        logits, theirs = self.states @ self.weight.t(), self.teacher.states @ self.teacher.weight.t()
        shared = min(logits.shape[1], theirs.shape[1])
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        theirs = 3.0 * torch.tanh(theirs / 3.0)
        return (logits / temperature).log_softmax(-1), (theirs[:, :shared] / temperature).log_softmax(-1)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(11, 11), (11, 8), (8, 11)])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (2.0, 0.7)])
def test_the_kl_over_all_tokens_equals_its_sum(
    vocab: int, teacher_vocab: int, softcap: float | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_targets, "BLOCK_ELEMENTS", {"cpu": 2 * vocab})
    heads = Heads(1, 7, vocab, teacher_vocab)
    ours, theirs = heads.probabilities(softcap, temperature)
    expected = torch.stack(
        [
            sum(theirs[i, v].exp() * (theirs[i, v] - ours[i, v]) for v in range(theirs.shape[1]))
            for i in range(len(ours))
        ]
    )
    assert_same(heads, heads.kl(heads.teacher, softcap, temperature), (ours, expected))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_kl_over_the_top_tokens_counts_all_others_as_one(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_targets, "BLOCK_ELEMENTS", {"cpu": 30})
    heads = Heads(2)
    kept = top_tokens(heads.teacher, k, 11)
    ours, theirs = heads.probabilities(None, 1.0)
    expected = []
    for i, ids in enumerate(kept.ids.tolist()):
        assert sorted(ids) == sorted(theirs[i].argsort(descending=True)[:k].tolist())
        p, q = theirs[i, ids].exp(), ours[i, ids].exp()
        rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
        expected.append((p * (p / q).log()).sum() + rest_p * (rest_p / rest_q).log())
    assert_same(heads, heads.kl(kept, None, 1.0), (ours, torch.stack(expected)))
    assert bool((torch.stack(expected) <= heads.kl(heads.teacher, None, 1.0)[1] + 1e-12).all())


def assert_same(heads: Heads, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Values, and gradients of both results together; `expected` has the student's log-probs of all tokens."""
    chosen = expected[0][torch.arange(len(heads.targets)), heads.targets]
    leaves, upstream = (heads.states, heads.weight), torch.linspace(-1, 2, len(chosen), dtype=torch.float64)
    torch.testing.assert_close(found, (chosen, expected[1]), **EXACT)
    gradients = [
        torch.autograd.grad((upstream * (logprobs + 2 * kl)).sum(), leaves, retain_graph=True)
        for logprobs, kl in (found, (chosen, expected[1]))
    ]
    torch.testing.assert_close(*gradients, **EXACT)


def test_all_tokens_as_top_tokens_give_the_whole_kl() -> None:
    heads = Heads(3)
    kept = top_tokens(heads.teacher, 99, 11)
    assert kept.ids.shape == (7, 11)
    torch.testing.assert_close(heads.kl(kept, None, 1.0)[1], heads.kl(heads.teacher, None, 1.0)[1], **EXACT)


def test_a_sure_student_has_a_finite_kl() -> None:
    """1 - q rounds to 0 in float32, and the sum over the other tokens does not."""
    states = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[40.0], [0.0], [0.0]])
    teacher = TopTokens(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))
    _, kl = logprobs_and_kl(states, weight, None, torch.tensor([0]), 1.0, teacher)
    assert float(kl.detach()) == pytest.approx(math.log(0.5) + 0.5 * (40 - math.log(2)), rel=1e-6)


def test_a_target_of_an_update_weighs_the_same_and_the_log_prob_counts_too() -> None:
    made = Offline(Teacher("teacher", gives_distributions=True), nll_weight=0.5)
    [first, second] = made.assign_token_weights([SequenceGroup([1], [[2, 3]]), SequenceGroup([1], [[4]])])
    assert (first.token_fields["weights"], second.token_fields["weights"]) == ([[1 / 3] * 2], [[1 / 3]])
    logprobs, kls = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 0.0, 1.0])
    loss = made.loss_of(Output(logprobs, None, {}, kls), collate([first, second]))
    assert float(loss.value) == pytest.approx((1.5 + 0.5 * 6) / 3)
    assert loss.metrics.to_floats() == {"train/kl": 0.5, "train/nll": 2.0, "train/tokens": 3.0}


def test_top_tokens_follow_their_targets_through_packing() -> None:
    """Masks, a prompt of its own for each completion, idle groups without a distribution."""
    tokens = TopTokens(torch.arange(6).view(3, 2), -torch.ones(3, 2))
    group = SequenceGroup([1], [[2, 3, 4]], {"weights": [[1.0, 0.0, 1.0]]}, [[True, False, True]], top_tokens=[tokens])
    idle = SequenceGroup([0], [[0]], {"weights": [[0.0]]})
    for packed in ([group, idle], [group.unshared(), idle], [*group.expanded(), idle]):
        found = collate(packed).soft_targets
        assert isinstance(found, TopTokens)
        assert found.ids.tolist() == [[0, 1], [4, 5], [0, 0]]
    assert collate([idle]).soft_targets is None


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_trls_gkd_trainer(temperature: float) -> None:
    """`generalized_jsd_loss` with beta 0, the forward KL, on whole tensors of logits; its mean is over the targets."""
    pytest.importorskip("trl", reason="TRL is not installed: requirements/benchmark.txt, see benchmarks/README.md")
    from trl.experimental.gkd import GKDTrainer

    heads = Heads(4)
    made = Offline(Teacher("teacher", gives_distributions=True))
    [group] = made.assign_token_weights([SequenceGroup([1], [heads.targets.tolist()])])
    batch = collate([group])
    batch = replace(batch, token_fields={"weights": torch.full((7,), 1 / 7, dtype=torch.float64)})
    logprobs, kls = heads.kl(heads.teacher, None, temperature)
    ours = made.loss_of(Output(logprobs, None, {}, kls), batch).value
    logits = heads.states @ heads.weight.t()
    capped = 3.0 * torch.tanh(heads.teacher.states @ heads.teacher.weight.t() / 3.0)
    theirs = GKDTrainer.generalized_jsd_loss(logits[None], capped[None], heads.targets[None], 0, temperature)
    torch.testing.assert_close(ours, theirs, **EXACT)
    leaves = (heads.states, heads.weight)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), **EXACT)


# --- options and hints ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to learn: name a `teacher`, or give a `hint`"),
        ({"hint": "the answer is {answer}"}, "must contain {prompt}"),
        ({"teacher": "t", "source": "dataset", "hint": "{prompt}"}, "hint is read only with source: rollout"),
        ({"teacher": "t", "teacher_sync_interval": 2}, "teacher_sync_interval is read only with self-distillation"),
        ({"teacher": "t", "cache": "f"}, "cache is read only with source: dataset"),
        ({"teacher": "t", "source": "dataset", "top_k": 5}, "top_k is read only with a `cache`"),
        ({"teacher": "t", "nll_weight": 0.5}, "nll_weight is read only with source: dataset"),
    ],
)
def test_options_that_cannot_be_or_would_change_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(options)


def test_settings_of_advantages_from_rewards_are_refused() -> None:
    with pytest.raises(ComponentError, match=r"advantage: group_mean_std, beta: 0\.04\. Use e\.g\."):
        build(Config(teacher="t"), resolve("grpo"), Sampling())


def test_a_hint_has_the_prompt_the_answer_and_any_column() -> None:
    row = Row("t/1", "2 + 2 =", 4, {"level": "easy"})
    assert hinted_prompt(r"{prompt} ({level}: {answer}, \boxed{})", row) == r"2 + 2 = (easy: 4, \boxed{})"
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    found = hinted_prompt(
        "{prompt} It is {answer}.", replace(row, prompt=[*chat, {"role": "user", "content": "Sure?"}])
    )
    assert found == [*chat, {"role": "user", "content": "Sure? It is 4."}]
    with pytest.raises(DataError, match=r"names {solution}, but the row t/1 has only: answer, level, prompt"):
        hinted_prompt("{prompt} {solution}", row)
    with pytest.raises(DataError, match="no message of the user"):
        hinted_prompt("{prompt}", replace(row, prompt=chat[1:]))
