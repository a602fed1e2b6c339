"""Members as Ray actors: joining or starting Ray, and placement. Ray is imported here and in `ray_group.py` only.

What does not fit is said at once, with what is missing, instead of being waited for.
"""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not os.environ.get("RAY_ADDRESS"):
    # Read when Ray is imported: a Ray of our own, on one machine, listens on the loopback interface only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray  # noqa: E402
from ray.actor import ActorHandle  # noqa: E402
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError  # noqa: E402
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

from trainer.cluster.ray_group import Host, RayWorkerGroup  # noqa: E402
from trainer.cluster.worker_group import Cluster, ClusterError, ResourceRequest, WorkerGroup  # noqa: E402
from trainer.config.schema import ClusterConfig  # noqa: E402

PASSED_ON = ("HF_", "LLMQUEST_", "TOKENIZERS_", "CUDA_", "NCCL_")
"""Environment variables with these prefixes reach every actor."""


class RayCluster(Cluster):
    """A Ray cluster of our own on this machine, or the one that `RAY_ADDRESS` names."""

    def __init__(self, config: ClusterConfig, needs: list[ResourceRequest], log_dir: Path) -> None:
        self.log_dir = log_dir.resolve()
        self.needs = {need.name: need for need in needs}
        self.start_timeout_s = config.start_timeout_s
        self._connect(needs)
        try:
            self.group = self._place(needs, config.start_timeout_s)
        except BaseException:
            ray.shutdown()
            raise

    def spawn(
        self,
        cls: type,
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup:
        need = self.needs[name]
        names = list(self.needs)
        first = sum(self.needs[other].count for other in names[: names.index(name)])
        meeting: dict[str, Any] = {}

        def start(member: int) -> ActorHandle:
            place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=first + member)
            options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "scheduling_strategy": place}
            return ray.remote(Host).options(**options).remote(str(self.log_dir / f"{name}-{member}.log"))

        def build(actor: ActorHandle, member: int) -> Any:
            if collective and not meeting:
                meeting.update(self._rendezvous(actor, f"{name}-{member}"))
            return actor.build.remote(cls, kwargs(member) | meeting)

        return RayWorkerGroup(name, need.count, start, build, max_restarts, self.log_dir)

    def _rendezvous(self, actor: ActorHandle, name: str) -> dict[str, Any]:
        try:
            return dict(ray.get(actor.rendezvous.remote(), timeout=self.start_timeout_s))
        except (RayActorError, GetTimeoutError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ClusterError(f"{name} did not start ({reason}); its log: {self.log_dir / name}.log.") from error
        except RayTaskError as error:
            raise error.cause from error

    def close(self) -> None:
        remove_placement_group(self.group)
        ray.shutdown()

    def _connect(self, needs: list[ResourceRequest]) -> None:
        # Tensors travel through the object store without a copy; driver and actors must agree on it.
        env = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        env |= {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        os.environ.update(RAY_ENABLE_ZERO_COPY_TORCH_TENSORS="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
        common: dict[str, Any] = {"runtime_env": {"env_vars": env}, "log_to_driver": False}
        common["logging_level"] = logging.ERROR
        if address := os.environ.get("RAY_ADDRESS"):
            self._join(address, common)
            return
        # The phases of a step take turns on the same cores, so a local cluster offers as many slots as members ask for.
        slots = max(os.cpu_count() or 1, math.ceil(sum(need.count * need.cpus for need in needs)))
        # Without the word `local` it would join whatever Ray somebody has started on this machine.
        ray.init("local", num_cpus=slots, include_dashboard=False, **common)

    def _join(self, address: str, options: dict[str, Any]) -> None:
        try:
            ray.init(address, **options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ClusterError(
                f"cannot join the Ray cluster at RAY_ADDRESS={address}: {error}. Is it up (`ray status`)? If it asks "
                "for a token, as where ~/.ray/auth_token exists, set RAY_AUTH_MODE=token and copy that file here."
            ) from error

    def _place(self, needs: list[ResourceRequest], timeout_s: float) -> PlacementGroup:
        have = ray.cluster_resources()
        for resource, total in (
            ("CPU", sum(need.count * need.cpus for need in needs)),
            ("GPU", sum(need.count * need.gpus for need in needs)),
        ):
            if total > have.get(resource, 0.0) + 1e-6:
                asked = ", ".join(f"{n.count} {n.name} x {getattr(n, resource.lower() + 's'):g}" for n in needs)
                raise ClusterError(
                    f"the Ray cluster has {have.get(resource, 0.0):g} {resource}s, but this run asks for {total:g} "
                    f"({asked}). Add nodes, or lower rollout.workers, graders.workers, learner.processes or "
                    f"cluster.{resource.lower()}s_per_*."
                )
        bundles = [{"CPU": need.cpus, "GPU": need.gpus} for need in needs for _ in range(need.count)]
        group = placement_group([{k: v for k, v in bundle.items() if v} for bundle in bundles], strategy="PACK")
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise ClusterError(
                f"Ray did not place {bundles} within {timeout_s:g} s, although the totals suffice: free now is "
                f"{ray.available_resources()}. Another job holds the rest, or no node is large enough for one member."
            )
        return group
