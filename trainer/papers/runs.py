"""Trains runs in parallel, each in a process with one thread, because small models gain nothing from more."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, chdir, contextmanager
from hashlib import blake2b
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

from trainer.cluster.hardware import available_cores
from trainer.config.load import dump
from trainer.config.schema import Config
from trainer.pipeline.run import RUNS, find_run
from trainer.run.folder import RunFolder
from trainer.run.trained import newest_step


class ArmError(RuntimeError):
    """A run of a recipe failed; the message names the run and its log file."""


def run_training(config: Config, folder: Path, log: Path) -> Path:
    """Train in this process with `folder` as the working directory and `log` as output; returns the run folder.

    Raises:
        ArmError: Ctrl-C or SIGTERM stopped the run before its last step.
    """
    from trainer.loop import train

    with _output_to(log), chdir(folder):
        run = train(config)
    if newest_step(RunFolder(run)) != config.steps:
        raise ArmError(f"stopped before step {config.steps}: repeat the command, which starts this run again")
    return run


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirect the output of this process and its children (graders, compilers) from the terminal to a file."""
    with log.open("ab") as file, ExitStack() as stack:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            terminal = os.dup(number)
            stack.callback(os.close, terminal)
            stack.callback(os.dup2, terminal, number)
            stack.callback(stream.flush)
            os.dup2(file.fileno(), number)
        yield


def finished_run(config: Config, folder: Path) -> Path | None:
    """The folder of a finished run with the same configuration below `folder`, or None."""
    found = find_run(config, folder / RUNS)
    return found.path if found is not None and found.step == config.steps else None


def folder_of(config: Config, folder: Path) -> Path:
    """Folder of the runs of this configuration. A hash keeps different configurations apart."""
    return folder / f"{config.name}-seed{config.seed}-{blake2b(dump(config).encode(), digest_size=4).hexdigest()}"


def run_all(configs: dict[str, Config], folder: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """Train every configuration that has no finished run; returns run folders by name.

    Args:
        configs: configurations by name.
        folder: parent of the run folders.
        report: called with the name of each finished run, marked "(kept)" if it was trained before.

    Raises:
        ArmError: a run failed. Finished runs are kept and not repeated.
    """
    places = {name: folder_of(config, folder) for name, config in configs.items()}
    done = {name: run for name, config in configs.items() if (run := finished_run(config, places[name])) is not None}
    for name in done:
        report(f"{name} (kept)")
    waiting = [name for name in configs if name not in done]
    for name, run in _train_parallel(waiting, configs, places):
        report(name)
        done[name] = run
    return {name: done[name] for name in configs}


def _train_parallel(
    names: list[str], configs: dict[str, Config], places: dict[str, Path]
) -> Iterator[tuple[str, Path]]:
    if not names:
        return
    for name in names:
        places[name].mkdir(parents=True, exist_ok=True)
    # Spawn instead of fork, because the threads of torch do not survive a fork.
    pool = ProcessPoolExecutor(min(available_cores(), len(names)), get_context("spawn"), _init_worker)
    with pool:
        futures = {pool.submit(run_training, configs[n], places[n], places[n].resolve() / "log.txt"): n for n in names}
        try:
            for future in as_completed(futures):
                yield futures[future], _result(future, futures[future], places)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                for worker in active_children():
                    worker.terminate()  # its run ends after the current step
            pool.shutdown(cancel_futures=True)
            raise


def _result(future: "Future[Path]", name: str, places: dict[str, Path]) -> Path:
    try:
        return places[name] / future.result().relative_to(places[name].resolve())
    except ArmError as error:
        raise ArmError(f"{name}: {error}") from error
    except BrokenProcessPool as error:
        raise ArmError(f"{name}: the process died (out of memory?); log: {places[name] / 'log.txt'}") from error
    except Exception as error:
        raise ArmError(f"{name}: {type(error).__name__}: {error}; log: {places[name] / 'log.txt'}") from error


def _init_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent ends: its results would be lost, and it would slow down the next attempt."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
