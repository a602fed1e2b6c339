"""A run on a Ray cluster that existed before it, and that continues after it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.trainer.conftest import Runs, rows
from trainer.cluster.worker_group import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FREE_CPUS = "import json, ray; ray.init(logging_level='error'); print(json.dumps(ray.available_resources()['CPU']))"


@pytest.fixture
def three_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of one node, ended afterwards with everything in it."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short: Ray makes sockets in it
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--temp-dir={folder}"]
        options = ["--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}", "--num-cpus=3"]
        with (Path(folder) / "output.txt").open("w") as output:
            process = subprocess.Popen(
                [*command, *options, "--include-dashboard=false", "--disable-usage-stats"], stdout=output, stderr=output
            )
        try:
            monkeypatch.setenv("RAY_ADDRESS", address)
            yield
        finally:
            members = psutil.Process(process.pid).children(recursive=True)
            for ending in (process, *members):
                ending.kill()
            psutil.wait_procs(members, timeout=20)
            process.wait(20)


def free_cpus() -> float | None:
    """CPUs that nobody holds; None where there is no cluster yet."""
    result = subprocess.run(
        [sys.executable, "-c", FREE_CPUS], env=os.environ, capture_output=True, text=True, timeout=90
    )
    return float(json.loads(result.stdout)) if result.returncode == 0 else None


def wait_for_three_cpus(within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while free_cpus() != 3:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.usefixtures("three_cpus")
def test_a_run_joins_a_cluster_and_leaves_it_as_it_was(runs: Runs) -> None:
    wait_for_three_cpus(60)
    code, output = runs.command("cluster.kind=ray", "rollout.workers=2").wait()
    assert code == 2, output
    assert "has 3 CPUs, but this run asks for 4 (1 learner x 1, 2 rollout x 1, 1 grader x 1)" in output
    code, output = runs.command("cluster.kind=ray", "steps=2", "name=joined").wait(300)
    assert code == 0, output
    assert [row["step"] for row in rows(runs.newest("joined"))] == [1, 2]
    wait_for_three_cpus(30)
