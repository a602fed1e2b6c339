"""Workers as Ray actors: joining or starting Ray, and placement. Ray is imported here and in `ray_group.py` only.

A run that does not fit fails at once, with the missing resource in the message, instead of waiting.
"""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not os.environ.get("RAY_ADDRESS"):
    # Ray reads this when it is imported: a local cluster then listens on the loopback interface only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray  # noqa: E402
from ray.actor import ActorHandle  # noqa: E402
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError  # noqa: E402
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

from trainer.cluster.ray_group import Host, RayWorkerGroup  # noqa: E402
from trainer.cluster.worker_group import Cluster, ClusterError, ResourceRequest, Worker, WorkerGroup  # noqa: E402
from trainer.config.cluster_section import ClusterConfig  # noqa: E402

PASSED_ON = ("HF_", "LLMQUEST_", "TOKENIZERS_", "CUDA_", "NCCL_")
"""Environment variables with these prefixes reach the actors of a cluster that was joined. Those of a local cluster
inherit all variables."""

SENDS_TENSORS = {"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}
"""Environment of actors that put tensors into the object store, so that their readers need no copy. Ray then imports
torch when it starts the process: not for graders."""


class RayCluster(Cluster):
    """A new Ray cluster on this machine, or the existing one that `RAY_ADDRESS` names."""

    def __init__(self, config: ClusterConfig, requests: list[ResourceRequest], log_dir: Path) -> None:
        self.log_dir = log_dir.resolve()
        self.requests = {request.name: request for request in requests}
        self.start_timeout_s = config.start_timeout_s
        self._connect(requests)
        try:
            self.group = self._place(requests, config.start_timeout_s)
        except BaseException:
            ray.shutdown()
            raise

    def spawn(
        self,
        cls: type[Worker],
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup[Worker]:
        request = self.requests[name]
        names = list(self.requests)
        first = sum(self.requests[other].count for other in names[: names.index(name)])
        rendezvous: dict[str, Any] = {}

        def start(worker: int) -> ActorHandle:
            place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=first + worker)
            options = {"num_cpus": request.cpus, "num_gpus": request.gpus, "scheduling_strategy": place}
            options["runtime_env"] = SENDS_TENSORS if collective else None  # learners send their weights
            return ray.remote(Host).options(**options).remote(str(self.log_dir / f"{name}-{worker}.log"))

        def build(actor: ActorHandle, worker: int) -> Any:
            if collective and request.count > 1 and not rendezvous:  # a single worker meets nobody
                rendezvous.update(self._rendezvous(actor, f"{name}-{worker}"))
            return actor.build.remote(cls, kwargs(worker) | rendezvous)

        return RayWorkerGroup(name, request.count, start, build, max_restarts, self.start_timeout_s, self.log_dir)

    def _rendezvous(self, actor: ActorHandle, name: str) -> dict[str, Any]:
        try:
            return dict(ray.get(actor.rendezvous.remote(), timeout=self.start_timeout_s))
        except (RayActorError, GetTimeoutError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ClusterError(f"{name} did not start ({reason}). Read its log: {self.log_dir / name}.log") from error
        except RayTaskError as error:
            raise error.cause from error

    def close(self) -> None:
        remove_placement_group(self.group)
        ray.shutdown()

    def _connect(self, requests: list[ResourceRequest]) -> None:
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address := os.environ.get("RAY_ADDRESS"):
            self._join(address, common)
            return
        # The phases of a step take turns on the same cores, so a local cluster offers all slots that workers request.
        slots = max(os.cpu_count() or 1, math.ceil(sum(request.count * request.cpus for request in requests)))
        # Without the word `local` it would join any Ray that is already running on this machine.
        ray.init("local", num_cpus=slots, include_dashboard=False, **common)

    def _join(self, address: str, options: dict[str, Any]) -> None:
        env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        try:
            ray.init(address, runtime_env={"env_vars": env}, **options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ClusterError(
                f"cannot join the Ray cluster at RAY_ADDRESS={address}: {error}. Is it running (`ray status`)? If it "
                "requires a token (it has a file ~/.ray/auth_token), set RAY_AUTH_MODE=token and copy that file here."
            ) from error

    def _place(self, requests: list[ResourceRequest], timeout_s: float) -> PlacementGroup:
        available = ray.cluster_resources()
        for resource, total in (
            ("CPU", sum(request.count * request.cpus for request in requests)),
            ("GPU", sum(request.count * request.gpus for request in requests)),
        ):
            if total > available.get(resource, 0.0) + 1e-6:
                requested = ", ".join(f"{n.count} {n.name} x {getattr(n, resource.lower() + 's'):g}" for n in requests)
                raise ClusterError(
                    f"the Ray cluster has {available.get(resource, 0.0):g} {resource}s, but this run asks for "
                    f"{total:g} ({requested}). Add nodes, or lower rollout.workers, graders.workers, learner.processes "
                    f"or cluster.{resource.lower()}s_per_*."
                )
        bundles = [{"CPU": request.cpus, "GPU": request.gpus} for request in requests for _ in range(request.count)]
        group = placement_group([{k: v for k, v in bundle.items() if v} for bundle in bundles], strategy="PACK")
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise ClusterError(
                f"Ray did not place {bundles} within {timeout_s:g} s, although the totals suffice: free now is "
                f"{ray.available_resources()}. Another job holds the rest, or no node is large enough for one worker."
            )
        return group
