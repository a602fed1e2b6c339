"""Our loss and its gradient compared with those of TRL's GRPOTrainer, on the same float32 tensors.

TRL's own `_compute_loss` runs on prepared inputs: the log-probs, and the factors of its correction for the engine.
TRL is in requirements/benchmark.txt; without it these tests are skipped.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.presets import resolve
from tests.algorithms.cases import MAX_TOKENS, Case, batch_of, policy, random_case, total

trl = pytest.importorskip("trl", reason="TRL is not installed: requirements/benchmark.txt, see benchmarks/README.md")

pytestmark = pytest.mark.slow  # its import alone takes seconds
WITHOUT_ENGINE = {"tis_cap": None}
SEEDS = range(8)


def padded(values: Tensor, sizes: list[int], behind: float = 0.0) -> Tensor:
    """[sequences, longest]"""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(sizes)), batch_first=True, padding_value=behind)


def sizes_of(case: Case) -> list[int]:
    return [len(completion) for sequence_group in case.sequence_groups for completion in sequence_group.completions]


def rollout_of(case: Case) -> Tensor:
    """The engine's log-probs [targets]."""
    return torch.tensor(
        [
            x
            for sequence_group in case.sequence_groups
            for row in sequence_group.token_fields["rollout_logprobs"]
            for x in row
        ]
    )


def single(case: Case) -> Case:
    """The case in float32, with one advantage for each sequence."""
    sequence_groups = [
        sequence_group.with_token_field(
            "advantages", [[row[0]] * len(row) for row in sequence_group.token_fields["advantages"]]
        )
        for sequence_group in case.sequence_groups
    ]
    return Case(sequence_groups, *(x.float() for x in case[1:]))


def ours(case: Case, row: str, cells: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    objective = policy(resolve(row, cells))
    batch = batch_of(objective, case)
    batch = replace(batch, token_fields={name: values.float() for name, values in batch.token_fields.items()})
    value, gradient, entropy_gradient, _ = total(objective, batch, case.new, case.entropies)
    return float(value), gradient, entropy_gradient


def theirs(
    case: Case, folder: Path, options: dict[str, Any], factors: Tensor | None, trainer: Any = trl.GRPOTrainer
) -> tuple[float, Tensor, Tensor]:
    """TRL's loss, its gradient in the log-probs and in the entropies."""
    sizes = sizes_of(case)
    per_sequence = [
        row[0] for sequence_group in case.sequence_groups for row in sequence_group.token_fields["advantages"]
    ]
    leaf, entropy_leaf = case.new.clone().requires_grad_(), case.entropies.clone().requires_grad_()
    mask = padded(torch.ones(sum(sizes)), sizes)
    tokens = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": torch.tensor(per_sequence),
        "old_per_token_logps": padded(case.old, sizes),
        "ref_per_token_logps": padded(case.reference, sizes),
        "sampling_per_token_logps": padded(rollout_of(case), sizes),
        "num_items_in_batch": mask.sum(),
        "old_logps": padded(case.old, sizes).sum(1),
    }
    if factors is not None:
        inputs["importance_sampling_ratio"] = padded(factors, sizes, behind=1.0)  # as TRL has it: exp(0)
    said = padded(leaf, sizes), padded(entropy_leaf, sizes), None
    loss = trainer._compute_loss(stand_in(folder, options, said), SimpleNamespace(training=True), inputs)
    loss.backward()
    grads = [torch.zeros_like(case.new) if x.grad is None else x.grad for x in (leaf, entropy_leaf)]
    return float(loss.detach()), *grads


def stand_in(folder: Path, options: dict[str, Any], said: Sequence[Tensor | None]) -> SimpleNamespace:
    """The attributes of a trainer that the method reads, for one process and one microbatch; options are TRL's own."""
    quiet = {"bf16": False, "use_cpu": True, "report_to": [], "use_bias_correction_kl": False, "beta": 0.0}
    args = trl.GRPOConfig(output_dir=str(folder), max_completion_length=MAX_TOKENS, **{**quiet, **options})
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(**{**vars(args), "steps_per_generation": 1}),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        use_vllm="vllm_importance_sampling_mode" in options,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_TOKENS,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=args.entropy_coef > 0,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: said,
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *inputs: trl.GRPOTrainer.get_high_entropy_mask(trainer, *inputs)
    for name in ("beta", "loss_type", "importance_sampling_level", "top_entropy_quantile", "entropy_coef"):
        setattr(trainer, name, getattr(args, name))
    trainer.off_policy_mask_threshold = args.off_policy_mask_threshold
    return trainer


def compare(
    case: Case,
    row: str,
    cells: dict[str, Any],
    folder: Path,
    options: dict[str, Any],
    factors: Tensor | None = None,
    trainer: Any = trl.GRPOTrainer,
) -> None:
    mine, other = ours(case, row, cells), theirs(case, folder, options, factors, trainer)
    assert mine[0] == pytest.approx(other[0], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(mine[1:], other[1:], rtol=1e-6, atol=1e-6)


ROWS = {
    "grpo": ("grpo", {}, {"loss_type": "grpo", "beta": 0.04}),
    "grpo, unbiased KL": (
        "grpo",
        {"kl_unbiased": True},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    ),
    "grpo, dual clip": ("grpo", {"dual_clip": 1.5}, {"loss_type": "grpo", "beta": 0.04, "delta": 1.5}),
    "grpo, sequence mask": (
        "grpo",
        {"off_policy_delta": 0.1, "beta": 0.0},
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.1},
    ),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, entropy bonus": (
        "dapo",
        {"entropy_bonus": 0.01},
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.01},
    ),
    "bnpo is token_mean": ("grpo", {"aggregation": "token_mean", "beta": 0.0}, {"loss_type": "bnpo"}),
    "gspo": (
        "gspo",
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide": (
        "gspo",
        {"clip_low": 0.2, "clip_high": 0.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.2, "epsilon_high": 0.3},
    ),
    "luspo": (
        "luspo",
        {"clip_low": 0.2, "clip_high": 0.3},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.2, "epsilon_high": 0.3},
    ),
    "sapo": ("sapo", {}, {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
    "cispo": ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo, tight": ("cispo", {"clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "vespo": ("vespo", {}, {"loss_type": "vespo"}),
    "vespo, other numbers": (
        "vespo",
        {"power_positive": 1.5, "power_negative": 2.5, "decay_positive": 0.7, "decay_negative": 1.1},
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_k_neg": 2.5,
            "vespo_lambda_pos": 0.7,
            "vespo_lambda_neg": 1.1,
        },
    ),
}  # fmt: skip
"""Name: our row, our cells, TRL's options."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, seed: int, tmp_path: Path) -> None:
    row, cells, options = ROWS[name]
    compare(single(random_case(seed)), row, {**WITHOUT_ENGINE, **cells}, tmp_path, options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("row", ["dapo", "gspo"])
def test_engine_corrections_of_the_same_name(mode: str, row: str, seed: int, tmp_path: Path) -> None:
    """The factors from TRL's formulas: exp of the gap or of its sum, then cut, or 0, outside of its bounds."""
    case, low, high = single(random_case(seed)), 0.6, 1.5
    gaps = (case.old - rollout_of(case)).split(sizes_of(case))
    ratios = torch.cat([(gap.sum().expand_as(gap) if "sequence" in mode else gap).exp() for gap in gaps])
    outside = (ratios < low) | (ratios > high)
    factors = ratios.clamp(low, high) if "truncate" in mode else ratios.masked_fill(outside, 0.0)
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    options = {"loss_type": "dapo", "epsilon_high": 0.28, "vllm_importance_sampling_mode": mode}
    if row == "gspo":
        options |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    assert mode in CORRECTIONS
    cells = {"is_correction": mode, "tis_floor": low, "tis_cap": high, **bounds}
    compare(case, row, cells, tmp_path, options, factors)


@pytest.mark.parametrize("seed", SEEDS)
def test_vespo_around_the_engine(seed: int, tmp_path: Path) -> None:
    """TRL multiplies the factors of all tokens into the weight's ratio: uncut ones make it pi / pi_engine."""
    case = single(random_case(seed))
    factors = (case.old - rollout_of(case)).exp()
    options = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}
    compare(case, "vespo", {"old_policy": "engine"}, tmp_path, options, factors)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.1, 0.3)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_gmpo(beta: float, low: float, high: float, seed: int, tmp_path: Path) -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    cells = {**WITHOUT_ENGINE, "beta": beta, "clip_low": low, "clip_high": high}
    options = {"beta": beta, "epsilon": low, "epsilon_high": high}
    compare(single(random_case(seed)), "gmpo", cells, tmp_path, options, trainer=gmpo.GMPOTrainer)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo(seed: int, tmp_path: Path) -> None:
    """TRL's RLOOTrainer clips the ratio of whole completions; on-policy its gradient is that of our row as it is."""
    case = single(random_case(seed))
    cells = {"ratio": "sequence_product", "surrogate": "clip", "aggregation": "sequence_mean"}
    mine = ours(case, "rloo", {**WITHOUT_ENGINE, **cells})
    other = theirs(case, tmp_path, {}, None, trl.RLOOTrainer)
    # TRL takes the difference of two sums over a sequence, ours is the sum of differences: its rounding is larger.
    assert mine[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(mine[1], other[1], rtol=1e-5, atol=1e-6)
    on_policy = case._replace(old=case.new)
    row, other = ours(on_policy, "rloo", WITHOUT_ENGINE), theirs(on_policy, tmp_path, {}, None, trl.RLOOTrainer)
    torch.testing.assert_close(row[1], other[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_high_entropy_tokens_of_one_sequence(seed: int, tmp_path: Path) -> None:
    """TRL's quantile is that of a microbatch: with one sequence in it, it is ours."""
    case = single(random_case(seed, groups=1))
    first = len(case.sequence_groups[0].completions[0])
    sequence_group = case.sequence_groups[0].expanded()[0]
    case = Case([sequence_group], *(x[:first] for x in case[1:]))
    options = {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2}
    compare(case, "dapo", {**WITHOUT_ENGINE, "top_entropy_fraction": 0.2}, tmp_path, options)
