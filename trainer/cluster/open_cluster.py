"""Opens the cluster of a run: workers in this process, or Ray actors."""

from pathlib import Path

from trainer.cluster.worker_group import Cluster, InlineCluster, ResourceRequest
from trainer.config.cluster_section import ClusterConfig


def open_cluster(config: ClusterConfig, requests: list[ResourceRequest], log_dir: Path) -> Cluster:
    """Open the kind of cluster that `config.kind` names. Ray is imported only where it is used.

    Raises:
        ClusterError: the cluster is too small; the message says which resource is missing.
    """
    if config.kind == "inline":
        return InlineCluster(config, requests, log_dir)
    from trainer.cluster.ray_cluster import RayCluster  # imports Ray

    return RayCluster(config, requests, log_dir)
