"""The cluster interface on real Ray: order, restarts, time limits that name missing workers, impossible placements."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmquest_rl.types import Sampling
from rollout.engine import EngineSetup, engine_config
from rollout.worker import RolloutWorker
from tests.trainer.cluster.workers import Slow, Worker
from trainer.cluster.open_cluster import open_cluster
from trainer.cluster.worker_group import Cluster, ClusterError, ResourceRequest, free_port
from trainer.config.cluster_section import ClusterConfig

NEEDS = [ResourceRequest("workers", 2, cpus=1, gpus=0), ResourceRequest("frail", 2, cpus=1, gpus=0)]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[Cluster]:
    opened = open_cluster(ClusterConfig(kind="ray"), NEEDS, logs)
    yield opened
    opened.close()


def test_answers_come_in_order_and_workers_differ(cluster: Cluster) -> None:
    group = cluster.spawn(Worker, "workers", lambda i: {"number": i})
    assert group.call_all(Worker.whoami, timeout_s=30) == [0, 1]
    assert group.map(Worker.square, [(x,) for x in range(7)], timeout_s=30) == [x * x for x in range(7)]
    assert group.call_each(Worker.store, [("a",), ("b",)], timeout_s=30) == ["a", "b"]
    assert group.call_all(Worker.stored, timeout_s=30) == ["a", "b"]
    reference = group.call_deferred(Worker.stored, timeout_s=30)[1]
    assert group.call_all(Worker.store, reference, timeout_s=30) == ["b", "b"]
    with pytest.raises(ValueError, match="as asked"):
        group.call_all(Worker.fail, timeout_s=30)
    group.close()


ENGINE = """
from dataclasses import dataclass

import users_neighbour
from llmquest_rl.options import Options


class Config(Options):
    size: int


@dataclass
class Engine:
    config: Config

    def generate(self, requests, sampling):
        return [[self.config.size, users_neighbour.FACTOR]]

    def close(self): ...


def check(model_path, config, setup):
    assert type(config) is Config, "the class that an actor unpickles is the one that it finds by the engine's name"


def build(model_path, config, setup):
    return Engine(config)
"""


def test_an_actor_finds_the_engine_and_the_options_of_a_users_file(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "users_neighbour.py").write_text("FACTOR = 2")
    for name in ("trainer", "rollout", "llmquest_rl"):  # files beside it that must not hide our packages
        (tmp_path / f"{name}.py").write_text("raise AssertionError")
    (tmp_path / "engine.py").write_text(ENGINE)
    name = f"{tmp_path}/engine.py"
    worker = {"engine": name, "config": engine_config(name)(size=5), "model_path": tmp_path, "setup": EngineSetup(8)}
    group = cluster.spawn(RolloutWorker, "workers", lambda i: worker)
    assert group.call(0, RolloutWorker.generate, [], Sampling(), timeout_s=30) == [[5, 2]]
    group.close()


def test_the_first_call_waits_until_every_worker_is_built_and_raises_why_one_was_not(cluster: Cluster) -> None:
    group = cluster.spawn(Slow, "workers", lambda i: {"number": i})
    assert group.call_all(Slow.whoami, timeout_s=0.5) == [0, 1], "the time of the start is not that of the call"
    group.close()
    group = cluster.spawn(Slow, "workers", lambda i: {"number": i + 1})
    with pytest.raises(ValueError, match="its model is damaged"):
        group.call_all(Slow.whoami, timeout_s=30)
    group.close()


def test_a_worker_that_does_not_answer_is_named(cluster: Cluster, logs: Path) -> None:
    group = cluster.spawn(Worker, "workers", lambda i: {"number": i})
    group.call(1, Worker.say, "hello from the worker", timeout_s=30)
    assert "hello from the worker" in (logs / "workers-1.log").read_text()
    with pytest.raises(ClusterError, match=r"no answer to hang within 0.5 s from workers-1"):
        group.call(1, Worker.hang, 3, timeout_s=0.5)
    group.close()


def test_a_dead_worker_is_rebuilt_and_its_work_redone(cluster: Cluster, tmp_path: Path) -> None:
    group = cluster.spawn(Worker, "frail", lambda i: {"number": i}, max_restarts=2)
    restored: list[int] = []
    group.on_restart = lambda worker: restored.append(group.call(worker, Worker.whoami, timeout_s=30))
    work = [(str(tmp_path / ("death" if x == 1 else "none")), x) for x in range(4)]
    (tmp_path / "none").touch()
    assert group.map(Worker.die_once, work, timeout_s=60) == [0, 1, 2, 3]
    assert group.restarts == 1 and len(restored) == 1
    with pytest.raises(ClusterError, match=r"frail-\d died during die .* 2 restarts are the limit"):
        group.call_all(Worker.die, timeout_s=60)
    group.close()


def test_a_worker_that_may_not_be_restarted_ends_the_run(cluster: Cluster) -> None:
    group = cluster.spawn(Worker, "workers", lambda i: {"number": i})
    with pytest.raises(ClusterError, match="workers-0 died during die"):
        group.call(0, Worker.die, timeout_s=30)
    group.close()


def test_a_cluster_that_is_too_small_says_what_is_missing(
    cluster: Cluster, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    from trainer.cluster.ray_cluster import RayCluster

    small = object.__new__(RayCluster)
    with pytest.raises(ClusterError, match=r"has 0 GPUs, but this run asks for 4 .*2 learners x 2"):
        small._place([ResourceRequest("learners", 2, cpus=1, gpus=2)], 5)
    with pytest.raises(ClusterError, match="did not place"):
        small._place([ResourceRequest("workers", 4, cpus=1, gpus=0)], 1)


def test_inline_workers_are_objects_next_door() -> None:
    cluster = open_cluster(ClusterConfig(kind="inline"), NEEDS, Path())
    group = cluster.spawn(Worker, "workers", lambda i: {"number": i})
    group.wait_ready()
    assert group.map(Worker.square, [(2,), (3,), (4,)], timeout_s=1) == [4, 9, 16]
    assert (
        group.call_each(Worker.store, [(1,), (2,)], timeout_s=1) == group.call_all(Worker.stored, timeout_s=1) == [1, 2]
    )
    group.close()
    cluster.close()


def test_no_free_port_is_said_and_not_waited_for() -> None:
    with pytest.raises(ClusterError, match=r"no free port on 192\.0\.2\.1 .*Cannot assign requested address"):
        free_port("192.0.2.1")  # an address for documentation, which no machine has


IN_OWN_NETWORK = ["unshare", "-rn", "sh", "-c"]


def has_own_networks() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.call([*IN_OWN_NETWORK, "ip link set lo up"], stderr=subprocess.DEVNULL) == 0


@pytest.mark.skipif(not has_own_networks(), reason="this machine lets no user make a network of their own")
def test_a_machine_whose_ports_are_all_taken() -> None:
    """The test runs in a separate network namespace with a single port, which is taken."""
    port_range = "ip link set lo up && echo 40000 40000 > /proc/sys/net/ipv4/ip_local_port_range"
    code = """
import socket
from trainer.cluster.worker_group import free_port
assert free_port("127.0.0.1") == 40000
with socket.socket() as taken:
    taken.bind(("127.0.0.1", 40000))
    free_port("127.0.0.1")
"""
    command = [*IN_OWN_NETWORK, f'{port_range} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith(
        "trainer.cluster.worker_group.ClusterError: no free port on 127.0.0.1"
    ), done
