"""An algorithm: the variant that each cell names, and the settings of all of them, as one flat section."""

from functools import partial
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.cells import CELLS, SURROGATES
from llmquest_rl.algorithms.covariance import COVARIANCES
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.unused_settings import Reader, readers_of_variants
from llmquest_rl.algorithms.variant import Weight, cell_field, known_variant, settings_of_variants
from llmquest_rl.options import Options

_cell = partial(cell_field, CELLS)


class SharedSettings(Options):
    """The cells, and the settings that do not belong to a single variant."""

    advantage: str = _cell(
        "advantage",
        "group_mean_std",
        "Advantage of a completion: a comparison of its reward with the rewards of its group. `reward` is the reward "
        "itself, without a comparison; `gae` compares it token by token with the values of a critic (PPO).",
    )
    phantom_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """An additional reward, without a completion, that counts in the mean and standard deviation of every group. Set it
    to the largest possible reward: a group in which all completions are wrong then has negative advantages (NGRPO,
    arXiv 2509.18851, advantage calibration). Only `group_mean_std`, `group_mean` and `leave_one_out` use it; null =
    none."""
    decoupled_rewards: bool = False
    """Every reward is compared with the group by itself, and the results are summed with the rewards' weights (GDPO,
    arXiv 2601.05242). Otherwise the weighted sum of the rewards is compared. A length penalty is a reward of its own
    then, and a completion to which a reward does not apply is left out of that comparison."""
    normalization: str = _cell(
        "normalization",
        "none",
        "Normalisation of the advantages of a whole step. `whiten` gives them mean 0 and standard deviation 1 over its "
        "tokens, `standardize` over its completions; `batch_mean` gives them mean 0 over its completions. `batch_std` "
        "divides them by the standard deviation of its rewards. `valid_groups` scales them up to make up for groups of "
        "equal rewards.",
    )
    advantage_limit: PositiveFloat | None = None
    """Advantages are clipped to +- this value, after `normalization` and the two weights below; null = no limit."""
    positive_weight: Weight = 1.0
    """Factor of advantages above 0 (0.1 with `reward` and rewards of +-1: W-REINFORCE, arXiv 2506.01347)."""
    negative_weight: Weight = 1.0
    """Factor of advantages below 0."""
    length_penalty: str = _cell(
        "length_penalty",
        "none",
        "Penalty for a completion's length, added to its reward before the comparison. `soft_overlong` is DAPO's; "
        "`relative` compares a length with the others of its group (Kimi k1.5).",
    )
    overlong_filter: bool = False
    """Completions that were cut at the token limit count in the group's baseline, but are left out of the loss."""
    dynamic_sampling: bool = False
    """Groups without a usable advantage, mostly because all rewards are equal, are replaced before the step: more
    prompts are sampled until there are `batch.prompts_per_step` usable groups (DAPO, arXiv 2503.14476, equation 11).
    See `batch.oversampling` and `batch.max_rounds`."""
    credit: str = _cell(
        "credit",
        "uniform",
        "Credit of the tokens of a completion: a factor of each token's advantage. `future_kl` is FIPO's.",
    )
    ratio: str = _cell(
        "ratio",
        "token",
        "Importance ratio of the current to the old policy. `sequence` is the geometric mean over a completion, "
        "`sequence_token` has its value and each token's own gradient, `sequence_product` is the plain product.",
    )
    old_policy: Literal["learner", "engine"] = "learner"
    """Old policy of the ratio. `learner`: the learner computes log-probs before a step's first update, and
    `is_correction` corrects for the engine's rounding. `engine`: the engine's log-probs are used, which saves a
    forward pass and needs no correction. The ratio then includes the engine's rounding and the drift since stale
    weights (`rollout.weight_sync_interval`)."""
    routing_replay: bool = False
    """Mixtures of experts: all updates of a step send each token to the experts that it went to when the learner
    computed the old policy's log-probs. The current router weighs them (Routing Replay, arXiv 2507.18071, section 5.3).
    Without it, tokens change experts between updates, so their ratios jump; `moe/changed_share` measures this."""
    surrogate: str = _cell("surrogate", "clip", "Loss of each token. `log_prob` has no ratio.")
    aggregation: str = _cell("aggregation", "sequence_mean", "Weights that sum token losses to one number.")
    covariance: str = _cell(
        "covariance",
        "none",
        "Restraint of the tokens with a large covariance of log-prob and advantage, which lower the entropy most: "
        "`clip` leaves some of them out of the policy loss (Clip-Cov), `kl` adds a penalty to them (KL-Cov).",
    )
    kl: str = _cell("kl", "k3", "Estimator of the KL to the reference model.")
    kl_in: Literal["loss", "reward"] = "loss"
    """Place of the KL. `loss`: a term of the loss. `reward`: after the group comparison, each token's advantage is
    reduced by the KL of this token and all later ones, without gradient; only `k1` has the KL's gradient there."""
    kl_unbiased: bool = False
    """Multiply `k1` or `k3` in the loss by the token's ratio, so that its gradient is the KL's (DeepSeek-V3.2,
    arXiv 2512.02556, equation 7)."""
    beta: Weight = 0.0
    """Weight of the KL; 0 = no KL, and no reference model in memory."""
    ref_sync_interval: PositiveInt | None = None
    """Steps between two updates of the reference model to the current model (DeepSeekMath, algorithm 1); null = the
    reference stays the initial model."""
    entropy_bonus: Weight = 0.0
    """Weight of the policy's entropy. It is subtracted from the loss, summed over tokens as `aggregation` says."""
    top_entropy_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each completion's tokens that stay in the policy loss: those with the largest entropy (0.2:
    arXiv 2506.01939)."""
    off_policy_delta: PositiveFloat | None = None
    """Completions with a negative advantage are left out of the policy loss if their mean log(pi_engine / pi) is above
    this value (DeepSeek-V3.2, arXiv 2512.02556, equation 9); null = none are."""
    is_correction: str = _cell(
        "is_correction",
        "token_truncate",
        "Correction for the engine's rounding: a factor of each token's policy loss, computed from "
        "pi_old / pi_engine before the step.",
    )
    tis_floor: NonNegativeFloat = 0.0
    """Lower bound of the correction's ratio; `..._binary_kl` and `..._binary_tv` bound a divergence instead."""
    tis_cap: PositiveFloat | None = 2.0
    """Upper bound of the correction's ratio; null = no correction (the gap is logged all the same)."""

    @field_validator(*CELLS)
    @classmethod
    def _is_a_variant(cls, name: str, info: ValidationInfo) -> str:
        return known_variant(CELLS, str(info.field_name), name)

    @model_validator(mode="after")
    def _phantom_has_a_mean_to_join(self) -> Self:
        if self.phantom_reward is not None and not ADVANTAGES[self.advantage].by_mean:
            by_mean = sorted(name for name, advantage in ADVANTAGES.items() if advantage.by_mean)
            raise ValueError(
                f"phantom_reward joins a group's mean, which {self.advantage!r} does not have: use one of "
                f"{', '.join(by_mean)}, or no phantom_reward"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.tis_cap is not None and self.tis_floor >= self.tis_cap:
            raise ValueError(f"tis_floor is {self.tis_floor:g}, but must be below tis_cap = {self.tis_cap:g}")
        if self.positive_weight == self.negative_weight == 0:
            raise ValueError("positive_weight and negative_weight are both 0: nothing is left to learn from")
        return self

    @model_validator(mode="after")
    def _rewards_can_be_compared(self) -> Self:
        advantage = ADVANTAGES[self.advantage]
        if advantage.nonnegative and self.length_penalty != "none":
            raise ValueError(
                f"{self.advantage!r} divides by a group's mean reward, so no reward may be below 0, and a length "
                "penalty is: set length_penalty: none"
            )
        if self.decoupled_rewards and (self.phantom_reward is not None or not advantage.group_relative):
            raise ValueError(
                "decoupled_rewards compares each reward with its group: use an advantage that compares "
                "(group_mean_std), and no phantom_reward"
            )
        return self

    @model_validator(mode="after")
    def _a_critic_compares_alone(self) -> Self:
        shaped = self.advantage_limit is not None or (self.positive_weight, self.negative_weight) != (1, 1)
        if ADVANTAGES[self.advantage].by_critic and (shaped or self.normalization not in ("none", "whiten")):
            raise ValueError(
                f"{self.advantage!r} is computed in the learner, token by token: use normalization: whiten or none, "
                "and no advantage_limit, positive_weight or negative_weight"
            )
        return self

    @model_validator(mode="after")
    def _no_token_keeps_a_gradient_that_it_must_not_have(self) -> Self:
        if COVARIANCES[self.covariance].masks_tokens and self.mixes_tokens:
            raise ValueError(
                "with this ratio or surrogate the loss of a token depends on all tokens of its completion, so the "
                "tokens that `covariance: clip` leaves out would keep a gradient: set ratio: token or sequence_token, "
                "or covariance: kl"
            )
        return self

    @property
    def mixes_tokens(self) -> bool:
        """Whether the loss of a token has gradients of other tokens: masking those does not remove their gradients."""
        surrogate = SURROGATES[self.surrogate]
        return surrogate.mixes_tokens or (RATIOS[self.ratio].of_sequences and not surrogate.own_gradient)

    @property
    def needs_advantage(self) -> bool:
        """Whether a group without any advantage has no gradient."""
        return self.beta == 0 and self.entropy_bonus == 0 and not self.has_critic

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return ADVANTAGES[self.advantage].by_critic


class Algorithm(*settings_of_variants(CELLS, SharedSettings), SharedSettings):  # type: ignore[misc]
    """One row: the cells of a policy-gradient algorithm, with the settings of every variant that they can name."""

    # To a type checker the settings of variants are `Any`. The functions of the variants, which read them, get the
    # algorithm as an object of their own settings' class.


def _corrects(algorithm: Algorithm) -> bool:
    return algorithm.old_policy == "learner" and algorithm.tis_cap is not None


def _bounds_ratio(algorithm: Algorithm) -> bool:
    return _corrects(algorithm) and CORRECTIONS[algorithm.is_correction].bounds_ratio


_CORRECTED = Reader("old_policy: learner and a tis_cap", _corrects)
_RATIO_BOUNDED = Reader("old_policy: learner, a tis_cap and a correction that bounds the ratio", _bounds_ratio)
_WITH_KL = Reader("a beta above 0", lambda algorithm: algorithm.beta > 0)

READERS: dict[str, Reader] = {
    "ratio": Reader("a surrogate that has a ratio", lambda algorithm: SURROGATES[algorithm.surrogate].has_ratio),
    "kl": _WITH_KL,
    "kl_in": _WITH_KL,
    "is_correction": _CORRECTED,
    "tis_floor": _RATIO_BOUNDED,
    "tis_cap": _RATIO_BOUNDED,
    **dict(readers_of_variants(CELLS)),
}
"""The condition under which each setting is read, by its name; a setting that is missing here always is."""
