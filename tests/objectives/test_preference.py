"""Preference methods: every row against its paper's equation in float64, against TRL, and packed in any way."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from llmquest_rl.algorithms.preference.presets import PRESETS
from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.objectives.preference import Config, Preference, build
from llmquest_rl.types import Completion, Group, Problem, Sampling, Score
from trainer.learner.microbatches import idle_group

PAIRS = 5
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def objective(method: str, **changes: Any) -> Preference:
    return build(Config.model_validate({"method": method, **changes}), resolve("grpo"), Sampling())


def draw(size: int, generator: torch.Generator) -> list[float]:
    """Log-probs of an answer."""
    return (-3 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.01).tolist()


class Case:
    """Pairs of answers with random lengths and log-probs under the policy, the old policy and the reference."""

    def __init__(self, seed: int, made: Preference) -> None:
        self.objective = made
        self.generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (PAIRS, 2), generator=self.generator).tolist()
        groups = [SequenceGroup([1, 2], [[3] * size for size in sizes]) for sizes in lengths]
        self.groups = made.assign_token_weights(groups)
        self.batch = self.filled()
        self.logprobs = self.random().requires_grad_()

    def random(self) -> Tensor:
        return torch.tensor(draw(len(self.batch_targets), self.generator), dtype=torch.float64)

    @property
    def batch_targets(self) -> list[int]:
        return [token for group in self.groups for answer in group.completions for token in answer]

    def filled(self) -> TokenBatch:
        """The packed batch with float64 fields, random log-probs of the other models, and the estimated KL."""
        batch = collate(self.groups)
        names = batch.token_fields
        fields = {
            name: torch.tensor(
                list(chain.from_iterable(chain.from_iterable(group.token_fields[name]) for group in self.groups)),
                dtype=torch.float64,
            )
            for name in names
        }
        fields |= {"ref_logprobs": self.random(), "old_logprobs": self.random()}
        return self.objective.with_shared_values([replace(batch, token_fields=fields)], lambda sums: None)[0]

    def answers(self, values: Tensor) -> list[list[Tensor]]:
        """`values` by group and answer: those of its tokens."""
        parts = iter(values.split([len(answer) for group in self.groups for answer in group.completions]))
        return [[next(parts) for _ in group.completions] for group in self.groups]


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def of_ratio(link: Callable[[Tensor, Tensor, Config], Tensor]) -> Callable[..., Tensor]:
    """The equation of a method that scores an answer by its summed log-ratio."""
    return lambda g, b, rg, rb, c: link(g.sum() - rg.sum(), b.sum() - rb.sum(), c)


def odds(logprobs: Tensor) -> Tensor:
    p = logprobs.mean().exp()
    return p / (1 - p)


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "dpo": of_ratio(lambda g, b, c: -log_sigmoid(c.beta * g - c.beta * b)),
    "cdpo": of_ratio(
        lambda g, b, c: (
            -(1 - c.label_smoothing) * log_sigmoid(c.beta * (g - b)) - c.label_smoothing * log_sigmoid(c.beta * (b - g))
        )
    ),
    "robust_dpo": of_ratio(
        lambda g, b, c: (
            (
                c.label_smoothing * log_sigmoid(c.beta * (b - g))
                - (1 - c.label_smoothing) * log_sigmoid(c.beta * (g - b))
            )
            / (1 - 2 * c.label_smoothing)
        )
    ),
    "ipo": lambda g, b, rg, rb, c: ((g - rg).mean() - (b - rb).mean() - 0.5 / c.beta) ** 2,
    "hinge": of_ratio(lambda g, b, c: (1 - c.beta * (g - b)).clamp(min=0)),
    "simpo": lambda g, b, rg, rb, c: -log_sigmoid(c.beta * g.mean() - c.beta * b.mean() - c.target_margin),
    "orpo": lambda g, b, rg, rb, c: -c.pair_weight * torch.log(torch.sigmoid(c.beta * torch.log(odds(g) / odds(b)))),
    "cpo": lambda g, b, rg, rb, c: -log_sigmoid(c.beta * (g.sum() - b.sum())),
    "apo_zero": of_ratio(lambda g, b, c: 1 - torch.sigmoid(c.beta * g) + torch.sigmoid(c.beta * b)),
    "apo_down": of_ratio(lambda g, b, c: torch.sigmoid(c.beta * g) + 1 - torch.sigmoid(c.beta * (g - b))),
    "sppo": of_ratio(lambda g, b, c: (g - 0.5 / c.beta) ** 2 + (b + 0.5 / c.beta) ** 2),
    "discopop": of_ratio(
        lambda g, b, c: (
            -log_sigmoid(c.beta * (g - b)) * (1 - torch.sigmoid(c.beta * (g - b) / c.tau))
            + torch.exp(-c.beta * (g - b)) * torch.sigmoid(c.beta * (g - b) / c.tau)
        )
    ),
    "rpo": of_ratio(lambda g, b, c: -log_sigmoid(c.beta * (g - b))),
}
"""The loss of a pair, from the log-probs of the tokens of the winner and the loser, and those of the reference."""


def equation(case: Case, logprobs: Tensor) -> Tensor:
    """The loss of the whole batch, as the method's paper writes it."""
    method = case.objective.method
    ours, reference = case.answers(logprobs), case.answers(case.batch.token_fields["ref_logprobs"])
    if method.method == "kto":
        return kto_equation(case, ours, reference)
    of_pair = EQUATIONS[method.method]
    losses = [of_pair(*a[:2], *r[:2], method) for a, r in zip(ours, reference, strict=True)]
    total = torch.stack(losses).mean()
    chosen = [answers[0] for answers in ours]
    if method.nll_mean == "answer":
        return total - method.nll_weight * torch.stack([answer.mean() for answer in chosen]).mean()
    return total - method.nll_weight * torch.cat(chosen).mean()


def kto_equation(case: Case, ours: list[list[Tensor]], reference: list[list[Tensor]]) -> Tensor:
    method, old = case.objective.method, case.answers(case.batch.token_fields["old_logprobs"])
    kl = torch.stack([o[2].sum() - r[2].sum() for o, r in zip(old, reference, strict=True)]).mean().clamp(min=0)
    losses = []
    for answers, others in zip(ours, reference, strict=True):
        good, bad = (answers[i].sum() - others[i].sum() for i in range(2))
        losses += [method.desirable_weight * (1 - torch.sigmoid(method.beta * (good - kl)))]
        losses += [method.undesirable_weight * (1 - torch.sigmoid(method.beta * (kl - bad)))]
    return torch.stack(losses).mean()


CHANGES: dict[str, dict[str, Any]] = {
    "cdpo": {"label_smoothing": 0.3},
    "robust_dpo": {"label_smoothing": 0.25},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.7},
    "simpo": {"target_margin": 0.4},
    "sppo": {"beta": 0.2},
    "hinge": {"beta": 0.4},
}
"""Settings other than the row's, with which a wrong use of them would show."""


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("method", PRESETS)
def test_loss_and_gradient_are_those_of_the_paper(method: str, changed: bool) -> None:
    for seed in range(3):
        case = Case(seed, objective(method, **(CHANGES.get(method, {"beta": 0.7}) if changed else {})))
        value, _ = case.objective.pair_losses(case.logprobs, case.batch)
        expected = equation(case, case.logprobs)
        torch.testing.assert_close(value, expected, **EXACT)
        ours, theirs = (torch.autograd.grad(v, case.logprobs)[0] for v in (value, expected))
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_every_row_has_an_equation() -> None:
    assert {*EQUATIONS, "kto"} == set(PRESETS), (
        "write the equation of a new row into tests/objectives/test_preference.py"
    )


@pytest.mark.parametrize("method", PRESETS)
def test_the_loss_is_the_same_in_any_microbatches(method: str) -> None:
    """The values of parts, one of them with an idle group, sum to that of the whole, and so do the gradients."""
    case = Case(0, objective(method))
    whole, metrics = case.objective.pair_losses(case.logprobs, case.batch)
    sizes = [sum(map(len, group.completions)) for group in case.groups]
    fields = {name: values.split(sizes) for name, values in case.batch.token_fields.items()}
    own, idle, zero = case.logprobs.split(sizes), idle_group([]), torch.zeros(1, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for numbers in ([0, 2], [1], [3, 4]):
        batch = collate([*(replace(case.groups[i], token_fields={}) for i in numbers), idle])
        given = {name: torch.cat([*(parts[i] for i in numbers), zero]) for name, parts in fields.items()}
        logprobs = torch.cat([*(own[i] for i in numbers), zero])
        total = total + case.objective.pair_losses(logprobs, replace(batch, token_fields=given))[0]
    torch.testing.assert_close(total, whole, **EXACT)
    gradients = [torch.autograd.grad(value, case.logprobs, retain_graph=True)[0] for value in (total, whole)]
    torch.testing.assert_close(*gradients, **EXACT)
    floats = metrics.to_floats(case.objective.derived_metrics)
    assert floats["train/margin"] == pytest.approx(floats["train/chosen_reward"] - floats["train/rejected_reward"])
    assert floats["train/pairs"] == (PAIRS if case.objective.method.takes_pairs else 2 * PAIRS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dpoo"}, "no preference method is called 'dpoo'; did you mean"),
        ({"link": "sigmoyd"}, "there is no 'sigmoyd'; did you mean sigmoid"),
        ({"tau": 0.1}, "tau is read only with link: discopop"),
        ({"method": "ipo", "label_smoothing": 0.1}, "label_smoothing is read only with link: sigmoid or robust"),
        ({"nll_mean": "answer"}, "nll_mean is read only with an nll_weight above 0"),
        ({"pair_weight": 0.0}, "nothing is left to learn from"),
        ({"method": "kto", "margin": "logprob"}, "margin must be log_ratio"),
        ({"pair_threshold": 1.0}, "read only with source: rollout_pairs"),
        ({"method": "kto", "source": "rollout_pairs"}, "use a row of pairs"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(changes)


@pytest.mark.parametrize(
    ("method", "group", "wanted"),
    [
        ("dpo", SequenceGroup([1], [[2]]), "pairs of a chosen and a rejected answer"),
        ("dpo", SequenceGroup([1], [[2]], {"sides": [[1.0]]}), "pairs of a chosen and a rejected answer"),
        ("dpo", SequenceGroup([1], [[2], [3], [4]]), "pairs of a chosen and a rejected answer"),
        ("kto", SequenceGroup([1], [[2]]), "answers that are good or bad"),
    ],
)
def test_a_group_of_another_kind_names_the_data_set_to_use(method: str, group: SequenceGroup, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"the method '{method}' learns from {wanted}: use a data set of them"):
        objective(method).assign_token_weights([group])


def test_only_targets_count_in_the_length_of_an_answer() -> None:
    """A pair whose conversations differ before the last replies has masks; SimPO's means leave those tokens out."""
    made = objective("simpo")
    [group] = made.assign_token_weights(
        [SequenceGroup([1], [[9, 9, 3, 4], [8, 5]], mask=[[False, False, True, True], [False, True]])]
    )
    batch = collate([group])
    logprobs = torch.tensor([-1.0, -3.0, -0.5])
    value, metrics = made.pair_losses(logprobs, batch)
    expected = -math.log(1 / (1 + math.exp(-(2.0 * (-2.0 + 0.5) - 1.0))))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert metrics.to_floats()["train/chosen_tokens"] == 2.0


def rated(*rewards: float | None) -> Group:
    answers = [Completion([10 + i, 2], [-0.5, -0.25], "", "stop", 0) for i in range(len(rewards))]
    return Group(Problem("t/0", "a", [1, 2], None), answers, [Score(reward) for reward in rewards])


@pytest.mark.parametrize(
    ("rewards", "threshold", "expected"),
    [
        ((0.0, 1.0, 0.5), None, (11, 10)),
        ((1.0, 1.0, 0.0, 0.0), None, (10, 12)),
        ((None, 0.2, 0.1), None, (11, 12)),
        ((1.0, 1.0), None, None),
        ((None, 1.0), None, None),
        ((0.4, 0.2), 0.5, None),
        ((0.9, 0.6), 0.5, None),
        ((0.5, 0.4), 0.5, (10, 11)),
    ],
)
def test_the_best_and_the_worst_completion_are_a_pair(
    rewards: tuple[float | None, ...], threshold: float | None, expected: tuple[int, int] | None
) -> None:
    made = objective("dpo", source="rollout_pairs", pair_threshold=threshold)
    pairs, metrics = made.sequence_groups([rated(*rewards)])
    assert [tuple(answer[0] for answer in pair.completions) for pair in pairs] == ([expected] if expected else [])
    assert metrics.to_floats()["reward/scored_samples"] == sum(reward is not None for reward in rewards)
    for pair in pairs:
        assert pair.prompt == [1, 2] and pair.token_fields["rollout_logprobs"] == [[-0.5, -0.25]] * 2


# --- TRL ---


def padded(parts: list[Tensor], width: int) -> Tensor:
    """Log-probs of answers behind a prompt of one token `[answers, width]`."""
    return torch.stack([torch.cat((part, part.new_zeros(width - len(part)))) for part in parts])


class Recorded(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        self[key] = defaultdict(list)
        return self[key]


def fake_trainer(logprobs: Tensor, **settings: Any) -> Any:
    """What TRL's loss functions read of their trainer, with a model that gives these log-probs `[answers, width]`."""

    class Answer(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            flat = torch.zeros_like(logprobs)
            return SimpleNamespace(log_probs=logprobs, entropy=flat, mean_logits=flat, is_top1=flat > 0)

    def same(values: Any) -> Any:
        return values

    return SimpleNamespace(
        model=Answer(),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        _metrics=Recorded(),
        _total_train_tokens=0,
        _tp_size=1,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        aux_loss_enabled=False,
        loss_weights=[1.0, settings.get("nll_weight", 0.0)],
        **settings,
    )


DPO_LOSSES = {
    "dpo": "sigmoid",
    "robust_dpo": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sppo": "sppo_hard",
    "discopop": "discopop",
}
TRL_REASON = "TRL is not installed: requirements/benchmark.txt, see benchmarks/README.md"


@pytest.mark.slow
@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
@pytest.mark.parametrize("method", DPO_LOSSES)
def test_equals_trls_dpo_trainer(method: str, nll_weight: float) -> None:
    """DPOTrainer's own `_compute_loss` runs, on log-probs put in place of its model's."""
    pytest.importorskip("trl", reason=TRL_REASON)
    from trl import DPOTrainer

    case = Case(1, objective(method, nll_weight=nll_weight))
    answers, reference = case.answers(case.logprobs), case.answers(case.batch.token_fields["ref_logprobs"])
    sides = [[pair[i] for pair in answers] for i in range(2)]
    width = max(len(part) for side in sides for part in side)
    table = torch.cat([padded(side, width) for side in sides])
    mask = torch.tensor([[0] + [1] * len(p) + [0] * (width - len(p)) for side in sides for p in side])
    settings = case.objective.method
    loss_types = [DPO_LOSSES[method]] + (["sft"] if nll_weight else [])
    trainer = fake_trainer(
        table,
        loss_types=loss_types,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        nll_weight=nll_weight,
        args=SimpleNamespace(discopop_tau=settings.tau),
    )
    trainer.loss_weights = trainer.loss_weights[: len(loss_types)]
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {
        f"ref_{name}_logps": torch.stack([pair[i].sum() for pair in reference])
        for i, name in enumerate(("chosen", "rejected"))
    }
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    ours, metrics = case.objective.pair_losses(case.logprobs, case.batch)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad(v, case.logprobs, retain_graph=True)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)
    recorded, floats = trainer._metrics["train"], metrics.to_floats(case.objective.derived_metrics)
    for name, key in {"logps/chosen": "chosen_logprob", "logps/rejected": "rejected_logprob"}.items():
        assert floats[f"train/{key}"] == pytest.approx(recorded[name][0])
    if method != "ipo":  # TRL's rewards are sums over the tokens there, too
        assert floats["train/margin"] == pytest.approx(recorded["rewards/margins"][0])
        assert floats["train/accuracy"] == pytest.approx(recorded["rewards/accuracies"][0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cpo", "simpo", "orpo"])
def test_equals_trls_losses_without_a_reference(method: str) -> None:
    """`cpo_loss` and `odds_ratio_loss`, with the mean over all chosen tokens that their trainers add."""
    pytest.importorskip("trl", reason=TRL_REASON)
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    case = Case(2, objective(method))
    settings, answers = case.objective.method, case.answers(case.logprobs)
    reduce = Tensor.sum if method == "cpo" else Tensor.mean
    chosen, rejected = (torch.stack([reduce(pair[i]) for pair in answers]) for i in range(2))
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=settings.pair_weight if method == "orpo" else settings.beta,
        loss_type="simpo" if method == "simpo" else "sigmoid",
        simpo_gamma=settings.target_margin,
        label_smoothing=settings.label_smoothing,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    nll = -torch.cat([pair[0] for pair in answers]).mean()
    if method == "orpo":
        theirs = nll - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    else:
        theirs = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean() + settings.nll_weight * nll
    ours, _ = case.objective.pair_losses(case.logprobs, case.batch)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if method == "orpo" else EXACT  # TRL computes the odds in float32
    torch.testing.assert_close(ours, theirs, **tolerance)
    gradients = [torch.autograd.grad(v, case.logprobs, retain_graph=True)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.slow
def test_equals_trls_kto_trainer() -> None:
    """KTOTrainer's own `_compute_loss`, with unequal weights of good and bad answers."""
    pytest.importorskip("trl", reason=TRL_REASON)
    from trl import KTOTrainer

    case = Case(3, objective("kto", desirable_weight=1.2, undesirable_weight=0.8))
    fields = case.batch.token_fields
    answers, reference, old = (case.answers(v) for v in (case.logprobs, fields["ref_logprobs"], fields["old_logprobs"]))
    own = [pair[i] for pair in answers for i in range(2)]
    width = max(map(len, own))
    mask = torch.tensor([[0] + [1] * len(part) + [0] * (width - len(part)) for part in own])
    settings = case.objective.method
    trainer = fake_trainer(
        padded(own, width),
        loss_type="kto",
        calculate_KL=True,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        _compute_kl_logps=lambda model, batch: torch.stack([group[2].sum() for group in old]),
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor([True, False] * PAIRS),
        "ref_logps": torch.stack([pair[i].sum() for pair in reference for i in range(2)]),
        "ref_KL_logps": torch.stack([group[2].sum() for group in reference]),
    }
    theirs = KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    ours, metrics = case.objective.pair_losses(case.logprobs, case.batch)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad(v, case.logprobs, retain_graph=True)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)
    assert metrics.to_floats()["train/kl"] == pytest.approx(trainer._metrics["train"]["kl"][0])
