"""The section `cluster` of a configuration: the placement of processes."""

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from llmquest_rl.options import Options


class ClusterConfig(Options):
    """Placement of the processes. `cluster: inline` is short for `cluster: {kind: inline}`."""

    kind: Literal["ray", "inline"] = "ray"
    """`ray` starts a local Ray cluster or joins the one at RAY_ADDRESS; `inline` runs everything in one process, for
    debuggers, notebooks and small models."""
    gpus_per_rollout_worker: NonNegativeFloat = 0.0
    """GPUs for each rollout worker; with a fraction it shares a GPU with others."""
    gpus_per_learner: NonNegativeFloat = 0.0
    """GPUs for each learner process; with a fraction it shares a GPU, e.g. with a rollout worker."""
    gpus_per_reward_model: NonNegativeFloat = 0.0
    """GPUs for each process of a reward model; with a fraction it shares a GPU, e.g. with a rollout worker."""
    cpus_per_rollout_worker: PositiveFloat | None = None
    """CPU cores of each rollout worker. null reserves one in Ray, but uses all cores of the machine, divided equally
    among the workers, because sampling and learning take turns."""
    cpus_per_learner: PositiveFloat | None = None
    """CPU cores of each learner process; null as for rollout workers."""
    cpus_per_reward_model: PositiveFloat | None = None
    """CPU cores of each process of a reward model; null as for rollout workers."""
    start_timeout_s: PositiveFloat = 300.0
    """Time limit in seconds for the placement and the start of actors."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
