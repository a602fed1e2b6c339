"""Every preset from rewards, lengths and log-probs to its loss, written from its paper with the numbers in place.

The expected values do not come from a row: `ROWS` here has an equation for each name, so a wrong cell or a wrong number
in a row fails. The package computes a whole step: `make_sequence_groups`, `token_weights`, `token_losses`.

Slopes are complex steps: row k of a completion's `new` has an imaginary step in token k, and the imaginary part of its
loss, over that step, is the gradient in that token. NumPy orders complex numbers by their real parts; `.real` stops a
gradient. Ratios are to the learner's old policy, and `tis` is the engine's correction
(docs/algorithms/is_correction.md).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmquest_rl.algorithms.later_rows import LATER_ROWS
from llmquest_rl.algorithms.presets import LITERATURE, PRESETS, resolve
from llmquest_rl.algorithms.sequence_groups import make_sequence_groups
from llmquest_rl.batch import collate
from llmquest_rl.objectives import CriticOptions
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.types import Completion, FinishReason, Group, Problem, Score
from tests.algorithms.cases import without_chance

CASES = settings(max_examples=30, deadline=None)
L_MAX = 10
STEP = 1e-30
PARTS = {"right": 1.0, "short": 0.5}
Vector = NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """A completion with log-probs of its tokens [n]; `new` is [n, n], the same rows but for their imaginary steps."""

    reward: float
    parts: tuple[float, float | None]
    """Two rewards, with the weights of `PARTS`, that sum to `reward`; the second need not apply."""
    ends: FinishReason
    new: Vector
    old: Vector
    engine: Vector
    reference: Vector
    values: Vector
    """The critic's."""


Step = list[list[Answer]]
Pairs = Iterable[tuple[Answer, Any]]
"""Completions, each with its advantage."""
Comparison = Callable[[Vector, Vector], Vector]
Losses = Iterator[Vector]
"""Terms of the loss by completion [n]: the same number but for the imaginary steps."""


def completions(step: Step) -> int:
    return sum(len(group) for group in step)


def tokens(step: Step) -> int:
    return sum(o.old.size for group in step for o in group)


def compared(step: Step, advantage: Comparison, added: Callable[[Vector], Any] = lambda n: 0.0) -> Pairs:
    """Advantages from the rewards and the lengths of a group; 0 where it has one completion, or equal rewards."""
    for group in step:
        lengths = np.array([o.old.size for o in group])
        rewards = np.array([o.reward for o in group]) + added(lengths)
        differ = rewards.max() > rewards.min()
        yield from zip(group, advantage(rewards, lengths) if differ else 0.0 * rewards, strict=True)


def centred(rewards: Vector, lengths: Vector) -> Vector:
    return np.asarray(rewards - rewards.mean())


def standardised(rewards: Vector, lengths: Vector) -> Vector:
    """The deviation is the sample's (n - 1), plus 1e-6."""
    return np.asarray((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6))


def best_of_four(rewards: Vector, lengths: Vector) -> Vector:
    """Advantages from all subsets of four, one by one."""
    subsets = list(combinations(range(len(rewards)), 4))
    best = np.array([max(rewards[i] for i in subset) for subset in subsets])
    if len(set(best)) < 2:
        return 0.0 * rewards
    worth = [best[[i in subset for subset in subsets]].mean() for i in range(len(rewards))]
    return np.asarray((worth - best.mean()) / (best.std() + 1e-6))


def whitened(pairs: Pairs) -> Pairs:
    """Mean 0 and deviation 1 over all tokens, plus 1e-6; 0 where all are equal."""
    pairs = list(pairs)
    values = np.repeat([a for _, a in pairs], [o.old.size for o, _ in pairs])
    scale = 1 / (values.std() + 1e-6) if values.max() > values.min() else 0.0
    return ((o, (a - values.mean()) * scale) for o, a in pairs)


def less_kl(o: Answer, a: float, beta: float) -> Vector:
    """A_t = A - beta sum_{t' >= t} log(pi_old / pi_ref): k1 in the reward (docs/algorithms/kl.md)."""
    return np.array([a - beta * (o.old - o.reference)[t:].sum() for t in range(o.old.size)])


def tis(o: Answer) -> Vector:
    """Truncated importance sampling of tokens (F. Yao et al., 2025) with cap 2, the default of every row."""
    return np.asarray(np.minimum(np.exp(o.old - o.engine), 2.0))


def ratio(o: Answer) -> Vector:
    return np.asarray(np.exp(o.new - o.old))


def ppo(r: Vector, a: Any, low: float, high: float) -> Vector:
    return np.asarray(np.minimum(r * a, np.clip(r, low, high) * a))


def grpo(step: Step, beta: float = 0.04) -> Losses:
    """DeepSeekMath, arXiv 2402.03300: section 4.1.2, equations 3 and 4."""
    for o, a in compared(step, standardised):
        k3 = np.exp(o.reference - o.new) - 1 - (o.reference - o.new)
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.2) - beta * k3).mean(-1) / completions(step)


def dr_grpo(step: Step) -> Losses:
    """arXiv 2503.20783: section 3.2, and listing 1, which divides by the longest completion allowed."""
    for o, a in compared(step, centred):
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.2)).sum(-1) / (completions(step) * L_MAX)


def dapo(step: Step) -> Losses:
    """arXiv 2503.14476: equations 8 (over the batch, as its authors run it), 10, 12, and 13 with L_cache 0.2 L_max;
    completions that the limit cut are compared with the others, and not trained on."""
    kept = tokens([[o for o in group if o.ends == "stop"] for group in step])
    for o, a in compared(step, standardised, lambda n: np.clip((0.8 * L_MAX - n) / (0.2 * L_MAX), -1, 0)):
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.28)).sum(-1) / kept * (o.ends == "stop")


def gspo(step: Step) -> Losses:
    """arXiv 2507.18071: equations 5 and 7; bounds of section 5.1."""
    for o, a in compared(step, standardised):
        s = np.exp((o.new - o.old).mean(-1, keepdims=True))
        yield -(tis(o) * ppo(s, a, 1 - 3e-4, 1 + 4e-4)).mean(-1) / completions(step)


def gspo_token(step: Step) -> Losses:
    """arXiv 2507.18071: equation 14, gspo's value with the slope of each token's own."""
    for o, a in compared(step, standardised):
        s = np.exp((o.new.real - o.old).mean(-1, keepdims=True)) * np.exp(o.new) / np.exp(o.new.real)
        yield -(tis(o) * ppo(s, a, 1 - 3e-4, 1 + 4e-4)).mean(-1) / completions(step)


def luspo(step: Step) -> Losses:
    """arXiv 2602.05261: gspo with each completion times its length."""
    for o, a in compared(step, standardised):
        s = np.exp((o.new - o.old).mean(-1, keepdims=True))
        yield -(tis(o) * ppo(s, a, 1 - 3e-4, 1 + 4e-4)).mean(-1) * o.old.size / completions(step)


def sapo(step: Step) -> Losses:
    """arXiv 2511.20347: f(r) = 4 / tau sigmoid(tau (r - 1)), tau 1 where A > 0 and 1.05 elsewhere."""
    for o, a in compared(step, standardised):
        tau = 1.0 if a > 0 else 1.05
        gate = 4 / tau / (1 + np.exp(-tau * (ratio(o) - 1)))
        yield -(tis(o) * gate * a).mean(-1) / completions(step)


def cispo(step: Step) -> Losses:
    """MiniMax-M1, arXiv 2506.13585: equations 4 and 5; weights up to 5 (ScaleRL, arXiv 2510.13786), no lower bound."""
    for o, a in compared(step, standardised):
        yield -(tis(o) * np.minimum(ratio(o).real, 5.0) * a * o.new).sum(-1) / tokens(step)


def gmpo(step: Step) -> Losses:
    """arXiv 2507.20673: the geometric mean of ratios that are cut at e^0.4 where A > 0 and at e^-0.4 elsewhere."""
    for o, a in compared(step, standardised):
        cut = np.minimum(ratio(o), np.exp(0.4)) if a > 0 else np.maximum(ratio(o), np.exp(-0.4))
        s = cut.prod(-1, keepdims=True) ** (1 / o.old.size)
        yield -(tis(o) * s * a).mean(-1) / completions(step)


def vespo(step: Step) -> Losses:
    """arXiv 2602.10693: equations 5 and 20, sections 3.3 and 3.5; the mean over tokens of its recipe."""
    for o, a in compared(step, standardised):
        w = ratio(o).real.prod(-1, keepdims=True)
        phi = w**2 * np.exp(3 * (1 - w)) if a > 0 else w**3 * np.exp(2 * (1 - w))
        yield -(tis(o) * phi * a * o.new).sum(-1) / tokens(step)


def dppo(step: Step) -> Losses:
    """arXiv 2602.04879: equations 12 and 13, delta 0.15 (appendix C.1); mu is the engine. A and mean of Dr. GRPO."""
    for o, a in compared(step, centred):
        pi, mu = np.exp(o.new.real), np.exp(o.engine)
        kept = ~((abs(pi - mu) > 0.15) & (((a > 0) & (pi > mu)) | ((a < 0) & (pi < mu))))
        yield -(kept * np.exp(o.new - o.engine) * a).sum(-1) / (completions(step) * L_MAX)


def rloo(step: Step, beta: float = 0.0) -> Losses:
    """Back to Basics, arXiv 2402.14740: the baseline is the mean of the others; k1 in the reward."""
    for o, a in compared(step, lambda r, _: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])):
        yield -(tis(o) * less_kl(o, a, beta) * o.new).sum(-1) / completions(step)


def reinforce(step: Step, beta: float = 0.0) -> Losses:
    """Williams 1992, as in Back to Basics, arXiv 2402.14740: no baseline. k1 in the reward."""
    for o in chain(*step):
        yield -(tis(o) * less_kl(o, o.reward, beta) * o.new).sum(-1) / completions(step)


def reinforce_pp(step: Step, beta: float = 0.0) -> Losses:
    """REINFORCE++, arXiv 2501.03262: PPO's clip; rewards normalised over the tokens of the step, then k1."""
    for o, a in whitened((o, o.reward) for o in chain(*step)):
        yield -(tis(o) * ppo(ratio(o), less_kl(o, a, beta), 0.8, 1.2)).sum(-1) / tokens(step)


def reinforce_pp_baseline(step: Step, beta: float = 0.0) -> Losses:
    """REINFORCE++, arXiv 2501.03262, with baseline: the group's mean off first; k2 in the loss."""
    for o, a in whitened(compared(step, centred)):
        k2 = (o.reference - o.new) ** 2 / 2
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.2) - beta * k2).sum(-1) / tokens(step)


def opo(step: Step) -> Losses:
    """arXiv 2505.23585: the baseline is the mean reward of the group's tokens."""
    for o, a in compared(step, lambda r, n: r - (n * r).sum() / n.sum()):
        yield -(tis(o) * a * o.new).sum(-1) / completions(step)


def gpg(step: Step) -> Losses:
    """arXiv 2504.02546: alpha = B / (B - M), of B completions M in groups without a difference; F_norm 1."""
    differ = completions([group for group in step if len({o.reward for o in group}) > 1])
    for o, a in compared(step, centred):
        yield -(tis(o) * (completions(step) / max(differ, 1)) * a * o.new).sum(-1) / tokens(step)


def pass_at_k(step: Step) -> Losses:
    """Pass@k Training, arXiv 2508.10751: equations 14 and 15 by counting, k 4, in GRPO without a KL."""
    for o, a in compared(step, best_of_four):
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.2)).mean(-1) / completions(step)


def maxrl(step: Step) -> Losses:
    """arXiv 2602.02710: (r - mean) / mean of the group, and the gradient of whole completions."""
    for o, a in compared(step, lambda r, _: (r - r.mean()) / r.mean()):
        yield -(tis(o) * ppo(ratio(o), a, 0.8, 1.2)).sum(-1) / completions(step)


def gdpo(step: Step) -> Losses:
    """arXiv 2601.05242, section 3: each reward in units of its group's deviation, the weighted sum, then mean 0 and
    deviation 1 over the completions of the step. A reward that does not apply is nowhere."""
    pairs = []
    for group in step:
        total = np.zeros(len(group))
        for k, weight in enumerate((1.0, 0.5)):
            known = np.array([i for i, o in enumerate(group) if o.parts[k] is not None], dtype=int)
            values = np.array([group[i].parts[k] for i in known], dtype=float)
            if len(set(values)) > 1:
                total[known] += weight * standardised(values, values)
        pairs += zip(group, total, strict=True)
    values = np.array([a for _, a in pairs])
    scale = 1 / (values.std(ddof=1) + 1e-6) if values.max() > values.min() else 0.0
    for o, a in pairs:
        yield -(tis(o) * ppo(ratio(o), (a - values.mean()) * scale, 0.8, 1.2)).mean(-1) / completions(step)


def ppo_row(step: Step, beta: float = 0.0) -> Losses:
    """PPO, arXiv 1707.06347, equations 7, 11 and 12: A_t = delta_t + 0.95 A_{t+1}, gamma 1, with the reward on the last
    token and k1 of every token in the reward; advantages normalised over the tokens of the update."""
    pairs = []
    for o in chain(*step):
        rewards = -beta * (o.old - o.reference)
        rewards[-1] += o.reward
        later, advantages = 0.0, np.zeros(o.old.size)
        for t in reversed(range(o.old.size)):
            behind = o.values[t + 1] if t + 1 < o.old.size else 0.0
            later = advantages[t] = rewards[t] + behind - o.values[t] + 0.95 * later
        pairs.append((o, advantages))
    values = np.concatenate([a for _, a in pairs])
    for o, a in pairs:
        white = (a - values.mean()) / (values.std() + 1e-6)
        yield -(tis(o) * ppo(ratio(o), white, 0.8, 1.2)).sum(-1) / tokens(step)


def binary_kl(log_p: Vector, log_q: Vector) -> Vector:
    """KL(p || q) of "this token or another"."""
    p, q = np.exp(log_p), np.exp(log_q)
    return np.asarray(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def flash_reinforce(step: Step) -> Losses:
    """FlashREINFORCE, 2026: the baseline is the mean of the step; sequences whose mean KL(mu || pi) is above 3e-3 are
    left out; the others have the weight pi / mu, without a bound."""
    mean = np.mean([o.reward for o in chain(*step)])
    for o in chain(*step):
        kept = binary_kl(o.engine, o.old).mean() <= 3e-3
        yield -(kept * np.exp(o.old - o.engine) * (o.reward - mean) * o.new).mean(-1) / completions(step)


def kpop(step: Step) -> Losses:
    """KPop, 2026, in the objective of IcePop (arXiv 2510.18855): a token counts if both KLs are at most 0.1."""
    for o, a in compared(step, standardised):
        kept = (binary_kl(o.engine, o.old) <= 0.1) & (binary_kl(o.old, o.engine) <= 0.1)
        weight = kept * np.exp(o.old - o.engine)
        yield -(weight * ppo(ratio(o), a, 0.8, 1.2)).mean(-1) / completions(step)


def covariances(pairs: list[tuple[Answer, Any]]) -> list[Vector]:
    """(log mu - its mean) (A - its mean) of each token of the step, by completion: arXiv 2505.22617, section 4."""
    logprobs = np.concatenate([o.engine for o, _ in pairs])
    advantages = np.repeat([a for _, a in pairs], [o.old.size for o, _ in pairs])
    values = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    return np.split(values, np.cumsum([o.old.size for o, _ in pairs])[:-1])


def clip_cov(step: Step, cov_fraction: float) -> Losses:
    """arXiv 2505.22617: no gradient for tokens with 1 < cov < 5; here for all, the paper draws 2e-4 of the tokens."""
    assert cov_fraction == 1.0
    pairs = list(compared(step, standardised))
    for (o, a), cov in zip(pairs, covariances(pairs), strict=True):
        kept = ~((cov > 1.0) & (cov < 5.0))
        yield -(kept * tis(o) * ppo(ratio(o), a, 0.8, 1.2)).sum(-1) / tokens(step)


def kl_cov(step: Step) -> Losses:
    """arXiv 2505.22617: |log pi - log pi_old| with the weight 1 for the 2e-4 of tokens with the largest covariance; of
    fewer than 5,000 tokens that is one."""
    pairs = list(compared(step, standardised))
    every = covariances(pairs)
    largest = max(np.concatenate(every))
    for (o, a), cov in zip(pairs, every, strict=True):
        distance = np.sign((o.new - o.old).real) * (o.new - o.old)
        penalty = ((cov == largest) & (largest > 0)) * distance
        yield -(tis(o) * ratio(o) * a - penalty).sum(-1) / tokens(step)


def drpo(step: Step) -> Losses:
    """arXiv 2606.09821, section 3: SPO's penalty with the bound 12.5 / mu of each token; A and mean as in DPPO."""
    for o, a in compared(step, centred):
        r = np.exp(o.new - o.engine)
        penalty = abs(a) * np.exp(o.engine) * (r - 1) ** 2 / (2 * 12.5)
        yield -(r * a - penalty).sum(-1) / (completions(step) * L_MAX)


def fipo(step: Step) -> Losses:
    """arXiv 2603.19835 on DAPO: A_t = A clip(exp(sum_k 2^(-(k - t) / 32) log r_k), 1, 1.2); tokens with r > 10 are not
    in the sum, and not weighted up where A < 0; dual bound 10."""
    for o, a in compared(step, standardised, lambda n: np.clip((0.8 * L_MAX - n) / (0.2 * L_MAX), -1, 0)):
        far, places = ratio(o)[0].real > 10, np.arange(o.old.size)
        counted = np.where(far, 0.0, (o.new - o.old)[0].real)
        future = [(2.0 ** (-(places[t:] - t) / 32) * counted[t:]).sum() for t in places]
        factor = np.clip(np.exp(future), 1.0, 1.2)
        weighted = a * np.where(far & (a < 0), 1.0, factor)
        gain = ppo(ratio(o), weighted, 0.8, 1.28)
        bounded = np.maximum(gain, 10 * weighted) if a < 0 else gain
        yield -(tis(o) * bounded).sum(-1) / tokens(step)


EQUATIONS: tuple[Callable[..., Losses], ...] = (
    *(grpo, dr_grpo, dapo, gspo, gspo_token, luspo, sapo, cispo, gmpo, vespo, dppo),
    *(rloo, reinforce, reinforce_pp, reinforce_pp_baseline, opo, gpg, pass_at_k),
    *(maxrl, gdpo, flash_reinforce, kpop, clip_cov, kl_cov, drpo, fipo),
)
ROWS = {equation.__name__: equation for equation in EQUATIONS} | {"ppo": ppo_row}
WITH_KL = ("ppo", "grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline")


def random_answer(draw: np.random.Generator, reward: float, ends: FinishReason, reused: bool) -> Answer:
    """Ratios from well within every bound to far outside."""
    n = int(draw.integers(1, L_MAX + 1))
    base, spread, rounding = draw.normal(-1, 1, n), draw.choice([3e-4, 0.02, 0.4, 1.2]), draw.choice([0.03, 0.5])
    scales = (spread, spread, rounding, 0.5)
    new, old, engine, reference = (-abs(base + draw.normal(0, scale, n)) for scale in scales)
    second = float(draw.integers(0, 3)) if draw.random() < 0.8 else None
    parts = (reward - PARTS["short"] * (second or 0.0), second)
    return Answer(
        reward, parts, ends, new + 1j * STEP * np.eye(n), old if reused else new, engine, reference, draw.normal(size=n)
    )


def random_step(seed: int, nonnegative: bool) -> tuple[Step, bool]:
    """Three groups, the last of equal rewards; whether an update came before, so that old log-probs are others."""
    draw = np.random.default_rng(seed)
    reused, sizes = draw.random() < 0.8, draw.integers((5, 1, 1), (11, 9, 6))
    rewards = [draw.integers(0, 2, n) if draw.random() < 0.5 else draw.normal(size=n) for n in sizes]
    rewards[2][:] = rewards[2][0]
    rewards = [abs(group) if nonnegative else group for group in rewards]
    ends: Iterator[FinishReason] = ("length" if i and draw.random() < 0.25 else "stop" for i in count())
    return [[random_answer(draw, float(x), next(ends), reused) for x in group] for group in rewards], reused


def graded(step: Step) -> Iterator[Group]:
    """The step as the package has it. The id of a token is its place in the step."""
    place = count()
    for group in step:
        made = [Completion([next(place) for _ in o.old], o.engine.tolist(), "", o.ends, 0) for o in group]
        scores = [Score(o.reward, dict(zip(PARTS, o.parts, strict=True)), weights=PARTS) for o in group]
        yield Group(Problem("s", "prompt", [0], None), made, scores)


def ours(name: str, step: Step, reused: bool, cells: dict[str, Any]) -> tuple[Vector, Vector]:
    """The term of each completion in the loss, and the gradient in all log-probs, in float64."""
    row, flat = Policy(resolve(name, cells), 1.0, L_MAX), list(chain(*step))
    sequence_groups = row.assign_token_weights(make_sequence_groups(list(graded(step)), row.algorithm, L_MAX)[0])
    batch = collate(sequence_groups)
    for key in batch.token_fields:
        exact = [x for sequence_group in sequence_groups for line in sequence_group.token_fields[key] for x in line]
        batch.token_fields[key] = torch.tensor(exact, dtype=torch.float64)
    batch.token_fields["ref_logprobs"] = torch.tensor(np.concatenate([o.reference for o in flat]))[batch.targets]
    if reused:
        batch.token_fields["old_logprobs"] = torch.tensor(np.concatenate([o.old for o in flat]))[batch.targets]
    if row.algorithm.has_critic:
        row = replace(row, critic=CriticOptions())
        batch.token_fields["values"] = torch.tensor(np.concatenate([o.values for o in flat]))[batch.targets]
        if row.algorithm.beta > 0:
            batch.token_fields["old_logprobs"] = torch.tensor(np.concatenate([o.old for o in flat]))[batch.targets]
        (batch,) = row.with_shared_values([batch], lambda sums: None)
    new = torch.tensor(np.concatenate([o.new[0].real for o in flat]), requires_grad=True)
    losses = batch.token_fields["weights"] * row.token_losses(new[batch.targets], batch)[0]
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    owners = np.repeat(np.arange(len(flat)), [o.old.size for o in flat])[batch.targets]
    return np.bincount(owners, losses.detach(), len(flat)), gradient.numpy()


def check(name: str, seed: int, **cells: float) -> None:
    step, reused = random_step(seed, nonnegative=name == "maxrl")
    values, gradient = ours(name, step, reused, cells)
    losses = list(ROWS[name](step, **cells))
    np.testing.assert_allclose(values, [loss[0].real for loss in losses], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient, np.concatenate([loss.imag for loss in losses]) / STEP, rtol=1e-9, atol=1e-12)


@CASES
@pytest.mark.parametrize("name", sorted(ROWS))
@given(st.integers(0, 2**31))
def test_a_row_is_its_papers_equation(name: str, seed: int) -> None:
    check(name, seed, **without_chance(name))


@CASES
@pytest.mark.parametrize("name", WITH_KL)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_the_kl_of_a_row_is_its_papers(name: str, seed: int, beta: float) -> None:
    check(name, seed, beta=beta)


def test_every_row_of_the_table_has_its_equation() -> None:
    """Rows in a surrogate's file need none here. Dynamic sampling, which no loss shows, must be in the right row."""
    missing = (LITERATURE | LATER_ROWS).keys() - ROWS.keys()
    assert not missing, "tests/algorithms/test_presets.py: write the equation of these rows"
    assert {name for name in ROWS if "kl" in PRESETS[name]} == set(WITH_KL)
    assert {name for name in ROWS if resolve(name).dynamic_sampling} == {"dapo", "clip_cov", "kl_cov", "fipo"}
