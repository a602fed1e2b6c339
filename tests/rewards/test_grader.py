"""The fault of one reward on one item gives that item a named failure, and has no other effect."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewards
from llmquest_rl.types import Score
from rewards.config import GraderConfig, RewardConfig
from rewards.failures import TooManyUnscoredError, check_unscored
from rewards.grader import GradeItem, Grader, check_rewards
from rewards.load import RewardError

HOSTILE = Path(__file__).parent / "hostile.py"
ONE = GraderConfig(processes=1)


class Unreadable:
    """A column that pickles, but cannot be read back."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("not a number",)


def own(function: str, **keys: object) -> RewardConfig:
    return RewardConfig.model_validate({"function": f"{HOSTILE}:{function}", **keys})


def item(completion: str, **columns: object) -> GradeItem:
    return GradeItem("q", completion, "a", columns)


def grade(completions: list[str], *functions: str, **limits: object) -> list[Score]:
    with Grader([own(f) for f in functions], GraderConfig.model_validate(limits)) as grader:
        return grader.grade([item(completion) for completion in completions])


def worker_processes(parent: int | str = "self") -> dict[int, str]:
    """Children of a process, zombies included: command lines by process id (a zombie's is empty)."""
    found = {}
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            if not command or "rewards.worker" in command:
                found[int(child)] = command
    return found


def is_running(pid: int) -> bool:
    """Alive, and no zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def hostile() -> Iterator[Grader]:
    """One grader for all deeds: each must leave it whole for the next."""
    with Grader([own("reward"), own("slow", weight=2.0)], GraderConfig(timeout_s=2.0, memory_mb=256)) as grader:
        yield grader


FAILURES = [
    ("hang", "timeout", "more than 2 s"),
    ("hang in C", "timeout", "more than 2 s"),
    ("hang with a child", "timeout", "more than 2 s"),
    ("own time limit", "timeout", "TimeoutError"),
    ("exit", "crash", "exit code 3"),
    ("segfault", "crash", "SIGSEGV"),
    ("kill", "crash", "SIGKILL"),
    ("memory", "memory", "memory_mb"),
    ("huge list", "memory", "memory_mb"),
    ("exception", "exception", "KeyError: 'missing' (hostile.py:"),
    ("sys.exit", "exception", "SystemExit"),
    ("nan", "invalid", "nan"),
    ("inf", "invalid", "inf"),
    ("string", "invalid", "'1.0' (str)"),
    ("list", "invalid", "[1.0, 0.0] (list)"),
    ("object", "invalid", "(object)"),
    ("empty dict", "invalid", "{}"),
    ("dict of strings", "invalid", "`reward/a`"),
    ("dict with nan", "invalid", "`reward/a`"),
]


@pytest.mark.parametrize(("deed", "failure", "detail"), FAILURES, ids=[deed for deed, _, _ in FAILURES])
def test_a_deed_costs_one_item(hostile: Grader, deed: str, failure: str, detail: str) -> None:
    completions = ["fine"] * 12
    completions[5] = deed
    scores = hostile.grade([item(completion) for completion in completions])
    bad = scores.pop(5)
    assert (bad.value, bad.failure) == (None, failure)
    assert "`reward" in bad.detail and detail in bad.detail
    assert bad.parts == {"slow": 0.5}, "the other reward of the same item is kept"
    for score in scores:
        assert score.value == 2.0 and score.failure is None and score.parts == {"reward": 1.0, "slow": 0.5}


def test_every_failure_at_once_keeps_the_order(hostile: Grader) -> None:
    completions = [completion for deed, _, _ in FAILURES if "hang" not in deed for completion in ("fine", deed)]
    scores = hostile.grade([item(completion) for completion in completions])
    expected = [kind for deed, failure, _ in FAILURES if "hang" not in deed for kind in (None, failure)]
    assert [score.failure for score in scores] == expected


def test_a_killed_reward_takes_its_children_along(hostile: Grader) -> None:
    hostile.grade([item("hang with a child")])
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x001000\x00" not in commands


def test_an_async_reward_has_a_time_limit() -> None:
    scores = grade(["await for ever", "fine"], "slow", timeout_s=0.5)
    assert [score.failure for score in scores] == ["timeout", None] and scores[1].value == 0.5


def test_a_hang_is_charged_once_and_replaced_in_less_than_a_second() -> None:
    with Grader([own("process")], GraderConfig(processes=1, timeout_s=1.0)) as grader:
        assert wait_until(lambda: len(worker_processes()) >= 2)
        grader.grade([item("0")] * 200)  # tasks are short now, so several are sent ahead
        time.sleep(1.5)  # the spare is ready
        before = time.monotonic()
        scores = grader.grade([item(text) for text in ["0"] * 40 + ["1000"] + ["0"] * 40])
        seconds = time.monotonic() - before
        assert [score.failure for score in scores] == [None] * 40 + ["timeout"] + [None] * 40
        assert grader._pool.replaced == 1
        assert len({score.parts["process"] for score in scores if score.parts}) == 2
        assert seconds < 1.0 + 1.0


def test_a_worker_killed_while_idle_is_replaced() -> None:
    with Grader([own("process")], ONE) as grader:
        time.sleep(2)  # the spare is ready, too, and idle
        grader.grade([item("0")])
        first = grader.grade([item("0")])[0].value
        os.kill(int(first), signal.SIGKILL)
        wait_until(lambda: not is_running(int(first)))
        second = grader.grade([item("0")] * 3)
        assert all(score.failure is None and score.value != first for score in second)


def test_items_too_large_to_send_ahead_do_not_block_on_a_hanging_worker() -> None:
    with Grader([own("large")], GraderConfig(processes=1, timeout_s=0.7)) as grader:
        items = [item("fine", data="x" * 10)] * 50
        items += [item("hang", data="x" * 3_000_000)] + [item("fine", data="x" * 3_000_000)] * 3
        scores = grader.grade(items)
    assert [score.failure for score in scores] == [None] * 50 + ["timeout"] + [None] * 3
    assert scores[-1].value == 3_000_000


def test_a_leak_over_many_items_ends_the_process_not_an_item() -> None:
    scores = grade(["leak"] * 40, "leaks", memory_mb=64, processes=1)
    assert all(score.failure is None for score in scores)
    assert len({score.value for score in scores}) > 2


def test_columns_that_cannot_travel_cost_their_item() -> None:
    with Grader([own("typed")], ONE) as grader:
        items = [item("int", f=lambda: 0), item("int", f=Unreadable()), item("int")]
        first, second, third = grader.grade(items)
    assert (first.failure, second.failure, third.value) == ("invalid", "exception", 2.0)
    assert "columns" in first.detail and "ValueError" in second.detail


def test_what_may_be_returned() -> None:
    names = ["int", "bool", "none", "numpy", "numpy bool", "sum", "score", "nothing applies"]
    scores = grade(names, "typed", processes=1)
    assert all(score.failure is None for score in scores)
    assert [score.value for score in scores] == [2.0, 1.0, None, 0.5, 1.0, 1.5, 0.25, None]
    assert scores[5].parts == {"typed": 1.5, "typed/a": 1.0, "typed/b": 0.5, "typed/c": None}
    assert scores[6].parts == {"typed": 0.25, "typed/score": 0.25, "typed/length": 100.0}


def test_what_does_not_apply_is_left_out_of_the_sum() -> None:
    with Grader([own("typed", weight=10.0), own("slow", weight=2.0)], ONE) as grader:
        scores = grader.grade([item("none"), item("int")])
    assert [score.value for score in scores] == [1.0, 21.0]


def test_columns_reach_the_reward_by_name() -> None:
    with Grader([own("columns"), own("compute_score"), own("with_options", factor=4, weight=0)], ONE) as grader:
        grader.check(["level", "topic"])
        (score,) = grader.grade([item("a", level=3, topic="sums")])
        assert score.value == 4.0 and score.parts == {"columns": 3.0, "compute_score": 1.0, "with_options": 4.0}
        with pytest.raises(
            RewardError, match=r"`columns` needs `level`, but the columns are: answer, completion, prompt"
        ):
            grader.check([])
        assert "needs `level`" in grader.grade([item("a")])[0].detail


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"function": f"{HOSTILE}:rewrad"}, "hostile.py has no function 'rewrad'; did you mean reward"),
        ({"function": "no_such_module:reward"}, "there is no module 'no_such_module', neither in the current folder"),
        ({"function": f"{HOSTILE}:with_options", "fctor": 1}, "has no argument `fctor`; did you mean factor"),
    ],
)
def test_a_reward_that_cannot_run_is_an_error_before_the_start(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_rewards([RewardConfig.model_validate(keys)], [])


@pytest.mark.parametrize(
    ("code", "message", "start_timeout_s"),
    [
        (
            "import surely_missing",
            "broken.py, line 1, `import surely_missing`: ModuleNotFoundError: No module named 'surely_missing'",
            60,
        ),
        ("def reward(:", "SyntaxError", 60),
        ("import os; os._exit(7)", "ended while it imported the rewards .exit code 7", 60),
        ("import time; time.sleep(1000)", "took more than 1.5 s", 1.5),
    ],
)
def test_a_file_that_cannot_be_imported_is_an_error_before_the_start(
    tmp_path: Path, code: str, message: str, start_timeout_s: float
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(code)
    before = set(worker_processes())
    with pytest.raises(ValueError, match=message):
        check_rewards([RewardConfig(function=f"{file}:reward")], [], GraderConfig(start_timeout_s=start_timeout_s))
    assert set(worker_processes()) <= before


def test_a_file_imports_its_neighbours_and_the_prints_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7")
    (tmp_path / "mine.py").write_text("from neighbour import VALUE\ndef reward(answer):\n    return VALUE")
    with Grader([RewardConfig(function=f"{tmp_path}/mine.py:reward"), own("prints")], ONE) as grader:
        assert grader.grade([item("x")])[0].value == 7.0


def test_workers_do_not_import_torch() -> None:
    with Grader([own("loaded_torch"), RewardConfig(name="exact_number")], ONE) as grader:
        assert grader.grade([GradeItem("q", "1", "1")])[0].parts == {"loaded_torch": 0.0, "exact_number": 1.0}
    folder = Path(rewards.__file__).parent
    modules = [f"{path.parent.name}.{path.stem}" for path in folder.glob("*.py")]
    modules += [f"rewards.builtin.{path.stem}" for path in (folder / "builtin").glob("*.py")]
    script = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_closing_leaves_no_process_and_no_zombie() -> None:
    before = set(worker_processes())
    grader = Grader([own("reward")], GraderConfig(timeout_s=0.5))
    grader.grade([item("exit"), item("hang"), item("fine")])
    assert set(worker_processes()) - before
    grader.close()
    assert set(worker_processes()) <= before


def test_an_interrupted_call_leaves_a_grader_that_works() -> None:
    with Grader([own("process")], GraderConfig(processes=1, timeout_s=30)) as grader:
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            grader.grade([item("0"), item("1000"), item("0")])
        assert [score.failure for score in grader.grade([item("0")] * 5)] == [None] * 5


@pytest.mark.parametrize("text", ["0", "hang in C"], ids=["idle", "hanging"])
def test_workers_end_when_their_parent_is_killed(text: str) -> None:
    script = f"""
import sys
from rewards.grader import Grader, GradeItem
from rewards.config import GraderConfig, RewardConfig
grader = Grader([RewardConfig(function="{HOSTILE}:reward")], GraderConfig(timeout_s=1000))
print("ready", flush=True)
grader.grade([GradeItem("q", "{text}", "a")])
sys.stdin.read()
"""  # no main guard: workers must not run the parent's script again
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        time.sleep(0.5)
        workers = list(worker_processes(parent.pid))
        parent.kill()
    assert workers and wait_until(lambda: not any(map(is_running, workers)))


def test_an_unscored_share_above_the_limit_stops_with_examples() -> None:
    completions = ["fine"] * 6 + ["nan", "exit", "exception", "nan"]
    scores = grade(completions, "reward")
    items = [item(completion) for completion in completions]
    assert check_unscored(scores, items, 0.4) == {"crash": 1, "exception": 1, "invalid": 2}
    with pytest.raises(TooManyUnscoredError) as caught:
        check_unscored(scores, items, 0.39)
    message = str(caught.value)
    assert "40% of 10" in message and "1 x crash, 1 x exception, 2 x invalid" in message
    for shown in (
        "completion ends: 'nan'",
        "completion ends: 'exit'",
        "completion ends: 'exception'",
        "prompt ends: 'q'",
    ):
        assert shown in message


def test_no_items_and_unknown_names() -> None:
    with Grader([own("reward")], ONE) as grader:
        assert grader.grade([]) == []
    with pytest.raises(ValueError, match="no rewards are configured"):
        Grader([])
    with pytest.raises(ValueError, match="two rewards are called `reward`"):
        Grader([own("reward"), own("reward")])


@pytest.mark.ray
def test_a_grader_lives_in_a_ray_actor() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(num_cpus=0.1)(Grader).remote([own("reward")], GraderConfig(timeout_s=1.0))
        scores = ray.get(actor.grade.remote([item(text) for text in ("fine", "hang", "exit", "fine")]), timeout=60)
        assert [score.failure for score in scores] == [None, "timeout", "crash", None]
        pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=10)
        workers = list(worker_processes(pid))
        ray.kill(actor)
        assert workers and wait_until(lambda: not any(map(is_running, workers)))
    finally:
        ray.shutdown()
