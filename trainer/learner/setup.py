"""The setup of the learner processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmquest_rl.objectives import Objective
from trainer.config.schema import LearnerConfig, OptimizerConfig


@dataclass(frozen=True, slots=True)
class LearnerSetup:
    """The model, objective and options of every learner process."""

    model_path: Path
    """A checkpoint folder in the Hub's layout."""
    objective: Objective
    optimizer: OptimizerConfig
    learner: LearnerConfig
    total_updates: int
    """Optimizer updates in the whole run: the schedule's length."""
    tokens_per_microbatch: int
    folder: Path
    """The run folder, in which a batch that made the gradient NaN is saved."""
    critic_path: Path | None = None
    """The folder of the model that the critic begins with; None = `model_path`."""
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and arithmetic; master weights and AdamW state are always float32."""
    device: Literal["cpu", "cuda"] = "cpu"
    gradient_checkpointing: bool = False
    seed: int = 0
    reference_path: Path | None = None
    """Checkpoint folder of the reference model, if the objective needs one; None = a copy of the initial model."""
    threads: int = 0
    """CPU threads for this process; 0 = torch's own choice."""
