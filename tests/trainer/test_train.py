"""Whole runs in one process."""

from tests.trainer.conftest import Runs, rows


def test_a_run_trains_and_leaves_what_it_should(runs: Runs) -> None:
    folder = runs.train("eval.at_start=true", "tracking.trackers=[tensorboard]")
    logged = rows(folder)
    assert [row["step"] for row in logged] == [0, 1, 2, 3]
    print(logged)
