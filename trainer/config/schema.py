"""The configuration tree: every option of a run, with its unit and its reason.

Files are read by `trainer.config.load`; rules that join several fields stand in `trainer.config.rules`; the sections of
components (`task`, `engine`, ...) are validated against the component's own file by `trainer.config.sections`.
`docs/configuration.md` is made from the docstrings here.
"""

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
from llmquest_rl.algorithms.unused_settings import check_read
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling
from rewards.config import GraderConfig, RewardConfig
from trainer.config.reward_model import RewardModelConfig
from trainer.config.sections import DatasetSection, EngineSection, ObjectiveSection, TaskSection
from trainer.run.folder import RUN_NAME

Dtype = Literal["auto", "float32", "bfloat16"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ModelConfig(Options):
    """The model that is trained."""

    path: str = "smollm2-135m-instruct"
    """A folder in the Hub's layout, a Hub id, or `smollm2-135m-instruct` (from an installed package, no network)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` reads the folder's config.json and tokenizer only and draws new weights from the seed."""
    dtype: Dtype = "auto"
    """Of the learner's arithmetic; master weights are float32 always. `auto` = bfloat16 on GPUs, and on CPUs whatever
    a short probe finds faster."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""


class DataConfig(Options):
    """What the run learns from: a task of prompts (RL), or a data set of sequences (supervised)."""

    task: TaskSection | None = None
    """For objectives that learn from rollouts."""
    dataset: DatasetSection | None = None
    """For objectives that learn from given sequences."""
    system_prompt: str | None = None
    """Put before every prompt as a system message; null leaves the chat template's own default."""
    chat_template: str | None = None
    """A Jinja template or a file with one; null = the tokenizer's own."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt in tokens, chat template included."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What happens to a longer prompt: dropped and counted, or the run stops."""
    malformed_rows: Literal["drop", "error"] = "error"
    """What happens to a row that cannot be read: dropped and counted, or the run stops. Its line is always named."""
    eval_size: NonNegativeInt = 64
    """Held-out samples (prompts or sequences), disjoint from training, drawn with the seed."""


class BatchConfig(Options):
    """The one vocabulary for sizes. What follows from it is printed as a table before the start."""

    prompts_per_step: PositiveInt = 16
    """RL: prompts sampled from in each step, over all rollout workers."""
    samples_per_prompt: PositiveInt = 8
    """RL: completions of each prompt, compared with each other (one group)."""
    oversampling: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.5
    """RL with `algorithm.dynamic_sampling`: prompts that a round asks, as a multiple of the groups still missing. Above
    1 there are fewer rounds; usable groups beyond the step's number serve the next one if it has the same weights
    (`rollout.weight_sync_interval`), else they are dropped."""
    max_rounds: PositiveInt = 10
    """RL with `algorithm.dynamic_sampling`: rounds in a step before it makes do with the usable groups that it has,
    with a warning. If it has none, the run stops and shows the rewards and some completions."""
    sequences_per_step: PositiveInt = 16
    """Supervised: packed sequences, or pairs of replies, in each step, over all learners."""
    tokens_per_sequence: PositiveInt = 512
    """Supervised: longest sequence in tokens; documents are cut and packed to it."""
    minibatches_per_step: PositiveInt = 1
    """Minibatches, hence optimizer updates, that a step's data is split into."""
    epochs_per_step: PositiveInt = 1
    """Times that a step's data is gone through (mu, the inner updates of GRPO)."""
    tokens_per_microbatch: PositiveInt = 8192
    """Most tokens of one forward and backward pass of a learner; a larger group is cut into its completions, each with
    its prompt. A memory knob only: results do not depend on it, but for losses that the model itself adds (`aux/...`),
    which are means over each pass."""
    zero_advantage_groups: Literal["skip", "take"] = "skip"
    """Groups with equal rewards have no advantages. `skip` leaves them out of the forward and backward passes (the
    gradient is the same; metrics of `policy/` then describe the other groups), and a step of such groups alone makes no
    update. With a KL term or an entropy bonus, which they have all the same, they are computed. `take` computes all of
    them."""
    max_zero_advantage_steps: PositiveInt = 5
    """Such steps in a row before a warning with sample completions."""

    def prompts_to_ask(self, missing: int) -> int:
        """The number of prompts that one round of dynamic sampling asks when `missing` groups are missing."""
        return ceil(missing * self.oversampling)


class RolloutConfig(Options):
    """Sampling completions. Ignored by supervised objectives."""

    engine: EngineSection = Field(default_factory=lambda: EngineSection(name="native"))
    """What samples: `vllm`, or `native`, our own."""
    workers: PositiveInt = 1
    """Rollout workers, each around one engine."""
    dtype: Dtype = "auto"
    """Of the engine's weights and arithmetic; `auto` as for the model."""
    sampling: Sampling = Sampling()
    """How training completions are drawn."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for one step's completions, with dynamic sampling for one round's, in seconds; the message names the
    worker that did not answer."""
    max_logprob_gap: PositiveFloat | None = 0.5
    """Largest mean absolute difference between the engine's and the learner's log-probs (nats per token) before the run
    stops: beyond it the two do not have the same weights. null = never stop."""
    weight_sync_interval: PositiveInt = 1
    """Steps between two syncs of the learners' weights to the workers. Above 1 the steps in between sample from stale
    weights, as asynchronous training does, and `max_logprob_gap` sees that too; `algorithm.old_policy: engine` takes
    ratios to the policy that sampled. A resumed run begins with fresh weights."""
    sleep: bool = False
    """Free the engine's memory while the learners work: for workers and learners that share a GPU."""
    save: bool = False
    """Keep every step's rollouts in the run folder, for `train --replay`."""


class OptimizerConfig(Options):
    """AdamW over float32 master weights."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate. Full fine-tuning with RL wants about 1e-6 to 2e-5, small models the upper end."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the averages of gradient and squared gradient; RL runs are short and their gradients change fast, so
    0.95 rather than 0.999."""
    eps: PositiveFloat = 1e-8
    """Keeps the division by the squared gradient's root finite."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay per unit of learning rate; norms and biases are left alone."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global L2 norm; null = no clipping (the norm is logged all the same)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after warm-up, over the run's optimizer updates."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates in which the learning rate rises linearly from 0."""
    min_lr_ratio: Share = 0.0
    """Where `linear` and `cosine` end, as a share of `lr`."""


class LearnerConfig(Options):
    """The processes that compute gradients."""

    processes: PositiveInt = 1
    """Learner processes: one for each GPU; on CPUs mostly one."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed ZeRO shares out over the processes: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in host memory instead of GPU memory; `parameters` includes the optimizer."""
    timeout_s: PositiveFloat = 1800.0
    """Longest wait for one update and for a collective between learners, in seconds."""
    max_skipped_updates: NonNegativeInt = 3
    """Updates with NaN or inf in loss or gradients that are skipped and counted before the run stops and saves the
    batch."""


class EvalConfig(Options):
    """Evaluation on held-out data."""

    every: NonNegativeInt = 10
    """Steps between evaluations, the last step always included; 0 = never."""
    at_start: bool = True
    """Also before the first step: the number to compare with."""
    samples_per_prompt: PositiveInt = 1
    """RL: completions of each held-out prompt; more than one with a temperature above 0 gives pass@k and mean@k."""
    temperature: NonNegativeFloat = 0.0
    """RL: 0 = greedy."""
    max_tokens: PositiveInt | None = None
    """RL: longest completion in tokens; null = that of `rollout.sampling`."""
    reward: str | None = None
    """RL: the name of the reward, or reward model, that decides whether a completion is correct; null = the first in
    `rewards`, or else in `reward_models`."""
    threshold: float = 1.0
    """RL: the smallest value of that reward, before weighting, that counts as correct. Scores of a reward model have no
    scale of their own: where one decides, choose a value, or look at `eval/reward` only."""


class CheckpointConfig(Options):
    """Saving everything that an exact resume needs."""

    every: NonNegativeInt = 10
    """Steps between checkpoints, the last step always included; 0 = the last step only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept, the best not counted."""
    best_metric: str | None = "eval/accuracy"
    """The checkpoint with the best value of this metric is kept as well; null = none."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best (`min` for losses)."""


class TrackingConfig(Options):
    """Where metrics go. `metrics.jsonl` in the run folder is always written."""

    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of Accelerate: `tensorboard`, `wandb`, `trackio`, ..."""
    completions_per_step: NonNegativeInt = 4
    """Sample completions saved in each step with their rewards by name."""


class AlgorithmSection(Algorithm):
    """A policy-gradient algorithm: a preset row, any cell of which can be overridden beside its name. The defaults are
    those of cells that the row leaves open: what it sets itself, `llmquest-rl algorithms` lists."""

    name: str = "grpo"
    """A row of `llmquest_rl/algorithms/presets.py`: `grpo`, `dr_grpo`, `dapo`, ...; `llmquest-rl algorithms` lists
    them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name", "grpo")
        resolve(name)
        return {**PRESETS[name], "name": name, **value}

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        check_read(self, resolve(self.name))
        return self


class ClusterConfig(Options):
    """Where the parts run. `cluster: inline` is short for `cluster: {kind: inline}`."""

    kind: Literal["ray", "inline"] = "ray"
    """`ray` starts a local Ray or joins the one at RAY_ADDRESS; `inline` runs all in one process, for a debugger or
    notebook."""
    gpus_per_rollout_worker: NonNegativeFloat = 0.0
    """GPUs given to each rollout worker; a fraction shares one."""
    gpus_per_learner: NonNegativeFloat = 0.0
    """GPUs given to each learner process; a fraction shares one with a rollout worker."""
    gpus_per_reward_model: NonNegativeFloat = 0.0
    """GPUs given to each process of a reward model; a fraction shares one with a rollout worker."""
    cpus_per_rollout_worker: PositiveFloat | None = None
    """CPU cores of each rollout worker; null = one is reserved, and all of the machine's are used, shared out equally:
    sampling and learning take turns."""
    cpus_per_learner: PositiveFloat | None = None
    """CPU cores of each learner process; null as above."""
    cpus_per_reward_model: PositiveFloat | None = None
    """CPU cores of each process of a reward model; null as above."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for placement and for actors to start, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class Config(Options):
    """A run."""

    name: str
    """The run folder is `runs/<name>/<start>/`."""
    seed: NonNegativeInt = 0
    """Every random number of the run follows from it."""
    steps: PositiveInt
    """Times around the loop."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection(name="policy"))
    """Which loss: `policy` (RL), `next_token` (pretraining, SFT), `reward_model` (pairs), `classify` (labels)."""
    algorithm: AlgorithmSection = Field(default_factory=lambda: AlgorithmSection(name="grpo"))
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """The total is their weighted sum; each is logged by name."""
    reward_models: tuple[RewardModelConfig, ...] = ()
    """Models whose scores are added to that sum."""
    graders: GraderConfig = GraderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def reward_names(self) -> list[str]:
        """Of rewards and reward models."""
        return [reward.name for reward in self.rewards] + [model.name for model in self.reward_models]

    @property
    def correct_if(self) -> tuple[str, float]:
        """The reward that decides what counts as correct in an evaluation, and its smallest value that does."""
        return self.eval.reward or self.reward_names[0], self.eval.threshold

    @property
    def eval_sampling(self) -> Sampling:
        """How held-out completions are drawn: as in training, but for what `eval` says."""
        sampling = self.rollout.sampling
        changes = {"temperature": self.eval.temperature, "max_tokens": self.eval.max_tokens or sampling.max_tokens}
        return sampling.model_copy(update=changes)

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name) or name == "latest":
            raise ValueError("it names a folder: use letters, digits, '-', '_' and '.' only (and not the word latest)")
        return name
