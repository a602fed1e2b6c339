"""The configuration tree: every option of a run, with its unit and its reason.

`trainer.config.load` reads the files, `trainer.config.rules` holds the rules on combinations of fields, and
`trainer.config.sections` validates the sections of components (`task`, `engine`, ...) against the component's file.
`docs/configuration.md` is generated from the docstrings here.
"""

from math import ceil
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from llmquest_rl.options import Options
from llmquest_rl.types import Sampling
from rewards.config import GraderConfig, RewardConfig
from trainer.config.algorithm_section import AlgorithmSection
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.cluster_section import ClusterConfig
from trainer.config.reward_model import RewardModelConfig
from trainer.config.sections import DatasetSection, EngineSection, ObjectiveSection, TaskSection
from trainer.run.folder import RUN_NAME

Dtype = Literal["auto", "float32", "bfloat16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ModelConfig(Options):
    """The model to train."""

    path: str = "smollm2-135m-instruct"
    """A folder in the Hub's layout, a Hub id, or `smollm2-135m-instruct` (an installed package, no network)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads the weights; `random` reads config.json and tokenizer only and draws weights from the seed."""
    dtype: Dtype = "auto"
    """Data type of the learner's arithmetic; master weights are always float32. `auto` is bfloat16 on GPUs; on CPUs a
    short speed test decides."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""


class DataConfig(Options):
    """The training data: a task with prompts (RL) or a data set of sequences (supervised)."""

    task: TaskSection | None = None
    """Source of prompts and gold answers. Objectives that learn from rollouts need it."""
    dataset: DatasetSection | None = None
    """Source of training sequences. Supervised objectives need it."""
    system_prompt: str | None = None
    """System message in front of every prompt; null = none, or the one that the chat template adds by itself."""
    chat_template: str | None = None
    """A Jinja chat template, or a file with one. `none` = no template: prompts stay plain text. null = the tokenizer's
    own template."""
    max_prompt_tokens: PositiveInt = 512
    """Maximum prompt length in tokens, chat template included."""
    long_prompts: Literal["drop", "error"] = "drop"
    """Treatment of prompts above that length: `drop` leaves out and counts them, `error` stops the run."""
    malformed_rows: Literal["drop", "error"] = "error"
    """Treatment of unreadable rows: `drop` leaves out and counts them, `error` stops the run. Both name the line."""
    eval_size: NonNegativeInt = 64
    """Number of held-out prompts or sequences. They are drawn with the seed and never trained on."""


class BatchConfig(Options):
    """Sizes of a step, counted over all processes. `train` prints the sizes that follow from them before it starts."""

    prompts_per_step: PositiveInt = 16
    """RL: prompts in each step, over all rollout workers."""
    samples_per_prompt: PositiveInt = 8
    """RL: completions of each prompt. They form one group, whose rewards are compared with each other."""
    oversampling: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.5
    """RL with `algorithm.dynamic_sampling`: prompts in a sampling round, as a multiple of the groups still missing.
    Values above 1 save rounds. Surplus groups are used in the next step if it samples with the same weights
    (`rollout.weight_sync_interval`); otherwise they are dropped."""
    max_rounds: PositiveInt = 10
    """RL with `algorithm.dynamic_sampling`: maximum sampling rounds in a step. After them the step trains on the usable
    groups that it has, with a warning. If it has none, the run stops and shows the rewards and some completions."""
    dynamic_sampling_from: PositiveInt = 1
    """RL with `algorithm.dynamic_sampling`: first step that samples in rounds; earlier steps take the groups of one
    round (RPT: 500, arXiv:2506.08007)."""
    equalize_wrong_groups: bool = False
    """RL: give all completions of a group the reward 0 if none of them is correct (`eval.reward`, `eval.threshold`), so
    that they have no advantage. Otherwise a reward with partial credit teaches which wrong answers are better."""
    sequences_per_step: PositiveInt = 16
    """Supervised: packed sequences (or pairs of replies) in each step, over all learners."""
    tokens_per_sequence: PositiveInt = 512
    """Supervised: maximum sequence length in tokens; documents are cut and packed to this length."""
    minibatches_per_step: PositiveInt = 1
    """Minibatches that a step's data is split into. Each of them makes one optimizer update."""
    epochs_per_step: PositiveInt = 1
    """Epochs over each step's data: mu, the inner iterations of GRPO (arXiv:2402.03300, algorithm 1)."""
    tokens_per_microbatch: PositiveInt = 8192
    """Maximum tokens in one forward and backward pass of a learner. It sets memory use, not results, except for losses
    that the model adds (`aux/...`), which are means over a pass. A larger group is split into its completions, each
    with its prompt."""
    zero_advantage_groups: Literal["skip", "take"] = "skip"
    """Treatment of groups whose advantages are all zero because their rewards are equal. `skip` leaves them out of the
    forward and backward passes: the gradient is the same, `policy/` metrics describe the other groups, and a step with
    only such groups makes no update. A KL term or an entropy bonus gives them a gradient, so then they are computed.
    `take` always computes them."""
    max_zero_advantage_steps: PositiveInt = 5
    """Consecutive steps with only such groups before a warning that shows sample completions."""

    def prompts_to_sample(self, missing: int) -> int:
        """Number of prompts in a round of dynamic sampling when `missing` groups are missing."""
        return ceil(missing * self.oversampling)


class AnswerLogprobs(Options):
    """The place of the gold answer behind a thought, for rewards without a verifier."""

    after: Annotated[str, Field(min_length=1)] = "</think>"
    """Text that ends a thought. The rest of the completion is left out; a completion without it gets it."""
    before: str = ""
    """Text between that end and the answer, e.g. `\\boxed{`."""
    max_tokens: PositiveInt = 64
    """Maximum length in tokens of what follows the thought; a longer answer is cut. The engine has room for it."""


class RolloutConfig(Options):
    """Sampling of completions. Supervised objectives ignore this section."""

    engine: EngineSection = Field(default_factory=lambda: EngineSection(name="native"))
    """Inference engine: `vllm`, or `native`, our own in plain PyTorch."""
    workers: PositiveInt = 1
    """Number of rollout workers; each runs one engine."""
    dtype: Dtype = "auto"
    """Data type of the engine's weights and arithmetic; `auto` as for `model.dtype`."""
    sampling: Sampling = Sampling()
    """Sampling parameters of training completions."""
    timeout_s: PositiveFloat = 600.0
    """Time limit in seconds for the completions of a step, or of a round of dynamic sampling. The error names
    the worker that did not answer."""
    max_logprob_gap: PositiveFloat | None = 0.5
    """Maximum mean absolute difference between the log-probs of engine and learner, in nats per token. The run stops
    above it, because engine and learner then do not have the same weights. null = never stop."""
    weight_sync_interval: PositiveInt = 1
    """Steps between two syncs of the learners' weights to the rollout workers. With more than 1, the steps in between
    sample from stale weights, as asynchronous training does. This also raises the difference that `max_logprob_gap`
    limits. `algorithm.old_policy: engine` takes ratios to the policy that sampled. A resumed run starts with fresh
    weights."""
    answer_logprobs: AnswerLogprobs | None = None
    """Compute the log-prob of the gold answer behind every thought with the engine; rewards get it as
    `answer_logprob`. The reward `likelihood_gain` needs it. null = do not."""
    sleep: bool = False
    """Free the engine's memory while the learners train, for rollout workers and learners that share a GPU."""
    save: bool = False
    """Save the rollouts of every step in the run folder; `train --replay` trains on them."""


class OptimizerConfig(Options):
    """AdamW on float32 master weights."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate. RL on all weights usually needs 1e-6 to 2e-5; small models take the upper end."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the averages of the gradient and the squared gradient. The second one is 0.95 instead of 0.999,
    because RL runs are short and their gradients change fast."""
    eps: PositiveFloat = 1e-8
    """Term added to the denominator of the update to keep it finite."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay per unit of learning rate; norms and biases are not decayed."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Maximum global L2 norm of the gradient; a larger one is scaled down. null = no clipping. It is always logged."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up, over the optimizer updates of the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates during which the learning rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate of `linear` and `cosine`, as a fraction of `lr`."""


class LearnerConfig(Options):
    """The processes that compute gradients and update the weights."""

    processes: PositiveInt = 1
    """Number of learner processes: one per GPU; one is usually best on CPUs."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, which partitions over the processes: 0 nothing, 1 the optimizer state, 2 also gradients, 3
    also parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State kept in host memory instead of GPU memory; `parameters` includes the optimizer state."""
    timeout_s: PositiveFloat = 1800.0
    """Time limit in seconds for one update and for a collective operation between learners."""
    max_skipped_updates: NonNegativeInt = 3
    """Maximum consecutive updates skipped for NaN or inf in loss or gradients; one more stops the run and saves the
    batch."""


class EvalConfig(Options):
    """Evaluation on held-out data."""

    every: NonNegativeInt = 10
    """Steps between two evaluations; the last step is always evaluated. 0 = never evaluate."""
    at_start: bool = True
    """Evaluate before the first step as well, to have a baseline."""
    samples_per_prompt: PositiveInt = 1
    """RL: completions of each held-out prompt. More than one, at a temperature above 0, gives pass@k and mean@k."""
    temperature: NonNegativeFloat = 0.0
    """RL: sampling temperature of evaluations; 0 = greedy decoding."""
    max_tokens: PositiveInt | None = None
    """RL: maximum completion length in tokens; null = the value of `rollout.sampling`."""
    reward: str | None = None
    """RL: name of the reward or reward model that decides whether a completion is correct; null = the first of
    `rewards`, or of `reward_models` when there are no rewards."""
    threshold: float = 1.0
    """RL: minimum value of that reward, before weighting, that counts as correct. Scores of reward models have no fixed
    scale: choose a value for yours, or read only `eval/reward`."""


class TrackingConfig(Options):
    """Destinations of metrics, in addition to `metrics.jsonl` in the run folder, which is always written."""

    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of Accelerate's trackers: `tensorboard`, `wandb`, `trackio`, ..."""
    completions_per_step: NonNegativeInt = 4
    """Number of sample completions saved in each step, with their rewards by name."""


class Config(Options):
    """The configuration of a run."""

    name: str
    """Name of the run, whose folder is `runs/<name>/<start>/`."""
    seed: NonNegativeInt = 0
    """Seed of every random number in the run."""
    steps: PositiveInt
    """Number of training steps. A step samples or reads one batch and trains on it."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection(name="policy"))
    """Training loss: `policy` (RL), `preference` (DPO and its relatives), `distill` (from a teacher), `next_token`
    (pretraining, SFT), `reward_model` (pairs), `classify` (labels)."""
    algorithm: AlgorithmSection = Field(default_factory=lambda: AlgorithmSection(name="grpo"))
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """Reward functions. A completion's reward is their weighted sum; each is logged by name."""
    reward_models: tuple[RewardModelConfig, ...] = ()
    """Reward models, whose weighted scores are added to that sum."""
    graders: GraderConfig = GraderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def reward_names(self) -> list[str]:
        """Names of all rewards, then of all reward models."""
        return [reward.name for reward in self.rewards] + [model.name for model in self.reward_models]

    @property
    def correct_if(self) -> tuple[str, float]:
        """The reward that decides whether a completion is correct in an evaluation, and its minimum value."""
        return self.eval.reward or self.reward_names[0], self.eval.threshold

    @property
    def eval_sampling(self) -> Sampling:
        """Sampling parameters of evaluations: those of training with the changes in `eval`."""
        sampling = self.rollout.sampling
        changes = {"temperature": self.eval.temperature, "max_tokens": self.eval.max_tokens or sampling.max_tokens}
        return sampling.model_copy(update=changes)

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name) or name == "latest":
            raise ValueError("it names a folder: use letters, digits, '-', '_' and '.' only, and not the word 'latest'")
        return name
