"""Options of checkpoints, and of the choice of the best one."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llmquest_rl.options import Options
from trainer.config.renamed_keys import MetricName


class CheckpointConfig(Options):
    """Checkpoints, which hold everything for an exact resume."""

    every: NonNegativeInt = 10
    """Steps between two checkpoints; the last step is always saved. 0 = only the last step."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    best_metric: MetricName | None = "eval/accuracy"
    """Metric that selects the best checkpoint, which is kept as well; null = none."""
    best_mode: Literal["max", "min"] = "max"
    """`max` if larger values of that metric are better, `min` if smaller ones are (losses)."""
    kl_coef: NonNegativeFloat = 0.0
    """RL: times the KL to the reference model per completion, in nats, it is subtracted from `best_metric`: reward -
    beta KL."""
    max_kl: PositiveFloat | None = None
    """RL: a checkpoint with a larger KL per completion, in nats, is never the best; null = no limit."""

    @property
    def reads_kl(self) -> bool:
        """Whether the choice of the best checkpoint needs the KL to the reference model."""
        return self.kl_coef > 0 or self.max_kl is not None
