"""The cells of a policy-gradient algorithm: which function each of them names, and the numbers that they take."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from llmquest_rl.algorithms.advantages import ADVANTAGES, BY_MEAN
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.ratios import OF_SEQUENCES, RATIOS
from llmquest_rl.algorithms.surrogates import OWN_GRADIENT, SURROGATES, Bounds
from llmquest_rl.options import Options

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Shape = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A number above 0 in a formula that infinity would make NaN."""


def _known(table: Mapping[str, object]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"there is no {name!r}; there are: {', '.join(table)}")
        return name

    return check


class Algorithm(Options):
    """One row: the cells of a policy-gradient algorithm."""

    advantage: Annotated[str, AfterValidator(_known(ADVANTAGES))] = "group_mean_std"
    """How a sample is compared with its group: `group_mean_std`, `group_mean`, `leave_one_out`, `length_weighted_mean`,
    `pass_at_k`; `reward` does not compare."""
    pass_k: PositiveInt = 4
    """The k of `pass_at_k`: fewer than the samples of a group."""
    phantom_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """A reward that joins the group's mean and deviation without a completion, best the largest that there is: groups
    in which all are wrong then have negative advantages (NGRPO, arXiv 2509.18851, advantage calibration). null = none;
    for `group_mean_std`, `group_mean` and `leave_one_out`."""
    normalization: Annotated[str, AfterValidator(_known(NORMALIZATIONS))] = "none"
    """What is done to the advantages of a whole step: `none`, `whiten` (mean 0 and deviation 1 over its tokens),
    `batch_std` (in units of the deviation of its rewards), `valid_groups` (made up for groups of equal rewards)."""
    advantage_limit: PositiveFloat | None = None
    """Advantages are cut at +- this, after the step's normalisation and the two weights; null = not."""
    positive_weight: Weight = 1.0
    """Multiplies advantages above 0 (0.1 with `reward` and rewards of +-1: W-REINFORCE, arXiv 2506.01347)."""
    negative_weight: Weight = 1.0
    """Multiplies advantages below 0."""
    length_penalty: Annotated[str, AfterValidator(_known(LENGTH_PENALTIES))] = "none"
    """What a completion's length adds to its reward before the comparison: `none`, `soft_overlong` (DAPO), `relative`
    to the group's (Kimi k1.5)."""
    length_weight: Weight = 1.0
    """Multiplies it; rewards of DAPO are +-1, so halve it for rewards of 0 and 1."""
    overlong_buffer: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """`soft_overlong`: the last share of `rollout.sampling.max_tokens`, in which the penalty grows from 0 to 1."""
    overlong_filter: bool = False
    """Completions that were cut at the token limit count in the group's baseline, and are left out of the loss."""
    dynamic_sampling: bool = False
    """Groups whose rewards teach nothing, mostly because all are equal, are replaced before the step: further prompts
    are asked until `batch.prompts_per_step` groups are left (DAPO, arXiv 2503.14476, equation 11). See
    `batch.oversampling` and `batch.max_rounds`."""
    ratio: Annotated[str, AfterValidator(_known(RATIOS))] = "token"
    """Importance ratio of the current to the old policy: `token`, `sequence` (geometric mean), `sequence_token` (its
    value, each token's gradient), `sequence_product`."""
    old_policy: Literal["learner", "engine"] = "learner"
    """Whose log-probs the ratio is taken to: those that the learner computes before a step's first update, corrected
    for the engine's rounding (`is_correction`), or the engine's own, which saves a forward pass, counts rounding and
    stale weights (`rollout.weight_sync_interval`) in the ratio, and leaves nothing to correct."""
    routing_replay: bool = False
    """Mixtures of experts: all updates of a step send each token to the experts that it went to when the learner
    computed the old policy's log-probs, with weights from the current router (Routing Replay, arXiv 2507.18071, section
    5.3). Without it, changed choices make ratios of tokens jump: `moe/changed_share` says how many there are."""
    surrogate: Annotated[str, AfterValidator(_known(SURROGATES))] = "clip"
    """What is minimised for each token: `clip`, `geometric_clip`, `soft_gate`, `clipped_weight`, `gamma_weight`,
    `binary_tv`, `binary_kl`; `log_prob` takes no ratio."""
    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """The ratio counts down to 1 - clip_low where the advantage is negative (`clipped_weight`: everywhere);
    `geometric_clip`: the log-ratio down to -clip_low; `binary_tv`, `binary_kl`: up to this divergence."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio counts up to 1 + clip_high where the advantage is positive (`clipped_weight`: everywhere);
    `geometric_clip`: the log-ratio up to clip_high; `binary_tv`, `binary_kl`: up to this divergence."""
    dual_clip: PositiveFloat | None = None
    """`clip`: the ratio counts up to this where the advantage is negative; above 1 + clip_high. null = no limit."""
    tau_positive: Shape = 1.0
    """`soft_gate`: how fast the gate closes where the advantage is positive."""
    tau_negative: Shape = 1.05
    """`soft_gate`: the same elsewhere."""
    power_positive: Shape = 2.0
    """`gamma_weight`, r^power exp(decay (1 - r)): how fast it falls below r = 1 where the advantage is positive."""
    power_negative: Shape = 3.0
    """`gamma_weight`: the same elsewhere."""
    decay_positive: Shape = 3.0
    """`gamma_weight`: how fast it falls above r = 1 where the advantage is positive."""
    decay_negative: Shape = 2.0
    """`gamma_weight`: the same elsewhere."""
    aggregation: Annotated[str, AfterValidator(_known(AGGREGATIONS))] = "sequence_mean"
    """How token losses become one: `sequence_mean`, `sequence_sum`, `token_mean`, `prompt_mean`, `max_tokens_mean`."""
    kl: Annotated[str, AfterValidator(_known(KL_ESTIMATORS))] = "k3"
    """Estimator of the KL to the reference model: `k3`, `k2`, `k1`, `abs`."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: a term of the loss, or what is taken off the advantage: the sum of it from a token to the end,
    without gradient and after the group comparison. There only `k1` has the KL's gradient."""
    kl_unbiased: bool = False
    """`k1` and `k3` in the loss: weighted with the token's ratio, so that their gradient is the KL's (DeepSeek-V3.2,
    arXiv 2512.02556, equation 7)."""
    beta: Weight = 0.0
    """Weight of that KL; 0 = none, and no reference model is held."""
    ref_sync_interval: PositiveInt | None = None
    """Steps after which the reference becomes the current model, again and again (DeepSeekMath, algorithm 1); null =
    it stays the initial one."""
    entropy_bonus: Weight = 0.0
    """Weight of the policy's entropy, which is taken off the loss with the same weights of tokens."""
    top_entropy_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The policy loss of the rest is left out: this share of each completion's tokens, those of largest entropy, stays
    (0.2: arXiv 2506.01939)."""
    off_policy_delta: PositiveFloat | None = None
    """Completions whose mean log(pi_engine / pi) is above this are left out where their advantage is negative
    (DeepSeek-V3.2, arXiv 2512.02556, equation 9); null = none."""
    is_correction: Annotated[str, AfterValidator(_known(CORRECTIONS))] = "token_truncate"
    """Correction for the engine's rounding, a factor of each token's policy loss made of pi_old / pi_engine, both
    before the step: `token_truncate`, `sequence_truncate`, `token_mask`, `sequence_mask`, `geometric_mask`,
    `reject`."""
    tis_floor: NonNegativeFloat = 0.0
    """Its lower bound."""
    tis_cap: PositiveFloat | None = 2.0
    """Its upper bound; null = no correction (the gap is logged all the same)."""

    @model_validator(mode="after")
    def _phantom_has_a_mean_to_join(self) -> Self:
        if self.phantom_reward is not None and self.advantage not in BY_MEAN:
            raise ValueError(
                f"phantom_reward joins a group's mean, which {self.advantage!r} does not have: take one of "
                f"{', '.join(sorted(BY_MEAN))}, or no phantom_reward"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip is {self.dual_clip:g}, but must be above 1 + clip_high = {1 + self.clip_high:g}"
            )
        if self.tis_cap is not None and self.tis_floor >= self.tis_cap:
            raise ValueError(f"tis_floor is {self.tis_floor:g}, but must be below tis_cap = {self.tis_cap:g}")
        if self.positive_weight == self.negative_weight == 0:
            raise ValueError("positive_weight and negative_weight are both 0: nothing is left to learn from")
        return self

    @property
    def bounds(self) -> Bounds:
        """What the surrogate needs."""
        return Bounds(
            low=self.clip_low,
            high=self.clip_high,
            dual=self.dual_clip,
            tau_positive=self.tau_positive,
            tau_negative=self.tau_negative,
            power_positive=self.power_positive,
            power_negative=self.power_negative,
            decay_positive=self.decay_positive,
            decay_negative=self.decay_negative,
        )

    @property
    def mixes_tokens(self) -> bool:
        """Whether the loss of a token has gradients of others in its sequence: to leave it out leaves theirs."""
        by_sequence = self.ratio in OF_SEQUENCES and self.surrogate not in OWN_GRADIENT
        return by_sequence or self.surrogate == "geometric_clip"

    @property
    def needs_advantage(self) -> bool:
        """Whether a group without any advantage has no gradient."""
        return self.beta == 0 and self.entropy_bonus == 0
