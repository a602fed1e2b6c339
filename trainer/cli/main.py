"""The command line: commands parse, and call one function each. Whatever is heavy is imported inside a command."""

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from trainer.cli.tools import printed, tools

if TYPE_CHECKING:
    from trainer.config.schema import Config

PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")
USER_ERROR = 2
LAST_LINE = {"eval/accuracy": "held-out accuracy", "eval/loss": "held-out loss"}
"""The metric whose first and last value end a run's output: the first of these that the run has."""
console = Console()
app = typer.Typer(
    help="Reinforcement learning of language models, on one loop that also does pretraining and SFT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tools)

ConfigFile = Annotated[Path, typer.Argument(help="A recipe, e.g. configs/quickstart.yaml; `configs` lists them.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For instance optimizer.lr=1e-5")]
Source = Annotated[Path, typer.Argument(help="A recipe, or a run: its configuration with the model that it trained.")]
Checkpoint = Annotated[str, typer.Option(help="Of a run: latest, best, or the number of a step.")]
RunReference = Annotated[str, typer.Argument(help="A run folder, runs/NAME for its newest run, or runs/latest.")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this name.")] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; load and start nothing.")] = False,
    replay: Annotated[Path | None, typer.Option(help="Train on rollouts saved in this folder.")] = None,
) -> None:
    """Train as a recipe says; the last line printed is what it led to."""
    from trainer.config.sizes import sizes_table

    settings = _load(config, overrides)
    console.print(sizes_table(settings))
    if dry_run:
        _print_checks(settings)
        return
    from trainer.loop import train as run_training
    from trainer.run.folder import RunFolder

    resume_path = RunFolder.open(resume_from or f"runs/{settings.name}").path if resume or resume_from else None
    _report(run_training(settings, resume_path, replay))


@app.command(name="eval")
def evaluate(
    source: Source,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Accuracy, mean@k and pass@k on held-out data, with 95 % confidence intervals."""
    from trainer.inference import evaluate as run_evaluation

    metrics, groups = run_evaluation(_load_for_sampling(source, checkpoint, overrides))
    for key in sorted(key for key in metrics if not key.endswith(("_low", "_high"))):
        interval = f"  [{metrics[f'{key}_low']:.4f}, {metrics[f'{key}_high']:.4f}]" if f"{key}_low" in metrics else ""
        console.print(Text(f"{key.removeprefix('eval/')}: {metrics[key]:.4f}{interval}"))
    console.print(f"problems asked: {len(groups)}")


@app.command()
def generate(
    source: Source,
    prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Completions of each prompt.")] = 1,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Answer prompts with a recipe's or a run's model, as `rollout.sampling` says."""
    from trainer.inference import answer_prompts

    for question, answers in zip(
        prompt, answer_prompts(_load_for_sampling(source, checkpoint, overrides), prompt, samples), strict=True
    ):
        for answer in answers:
            console.print(Text(f"{question}\n", "dim"), Text(answer), soft_wrap=True)


@app.command()
def rollout(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for the rollouts; `train --replay` reads it.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps' worth of prompts.")] = 1,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Sample and grade without training, and keep the rollouts."""
    from trainer.inference import generate_rollouts

    for step, groups in generate_rollouts(_load_for_sampling(source, checkpoint, overrides), steps, out):
        values = [score.value for group in groups for score in group.scores if score.value is not None]
        mean = f"{sum(values) / len(values):.4f}" if values else "none"
        console.print(f"step {step}: {len(groups)} prompts, {len(values)} scored completions, mean reward {mean}")
    console.print(Text(f"rollouts: {out}"), soft_wrap=True)


@app.command()
def export(
    run: RunReference,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    checkpoint: Checkpoint = "latest",
) -> None:
    """Copy a trained model out of its run, as a folder that transformers, vLLM and the Hub take."""
    from trainer.inference import export as export_model

    console.print(Text(f"model: {export_model(run, out, checkpoint)}"), soft_wrap=True)


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or runs/NAME for the newest of a name.")],
    metric: Annotated[list[str] | None, typer.Option(help="Keys of metrics.jsonl; may be given several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .png or .svg file; default: plot.png in the first run.")] = None,
    group_seeds: Annotated[bool, typer.Option(help="Runs that differ in their seed only become one band.")] = False,
) -> None:
    """Draw curves of one or several runs."""
    from trainer.run.plot import plot_runs

    console.print(f"plot: {plot_runs(runs, metric or (), out, group_seeds)}", soft_wrap=True)


def _load(path: Path, overrides: Iterable[str] | None) -> "Config":
    from trainer.config.load import load_config

    return load_config(path, overrides or ())


def _load_for_sampling(source: Path, checkpoint: str, overrides: Iterable[str] | None) -> "Config":
    """A recipe as it is; of a run, its saved configuration around the model that it trained."""
    if source.suffix in (".yaml", ".yml"):
        return _load(source, overrides)
    from trainer.inference import trained_model
    from trainer.run.folder import RunFolder

    model = json.dumps(str(trained_model(str(source), checkpoint)))
    return _load(RunFolder.open(source).config, [f"model.path={model}", "model.init=pretrained", *(overrides or ())])


def _print_checks(config: "Config") -> None:
    from trainer.cli.dry_run import dry_run

    if not all(list(printed(dry_run(config)))):
        raise typer.Exit(1)
    console.print("dry run: the configuration, the files, the data and the rewards are sound")


def _report(folder: Path) -> None:
    """The curve, and as the last line what training led to on held-out data."""
    from trainer.run.plot import plot_runs
    from trainer.run.tracking import JsonLines

    console.print(Text(f"run: {folder}\nplot: {plot_runs([folder])}"), soft_wrap=True)
    rows = JsonLines(folder / "metrics.jsonl").read()
    for key, label in LAST_LINE.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            console.print(f"{label}: {values[0]:.2f} -> {values[-1]:.2f}")
            return


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=debug, show_time=False)],
    )
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.INFO)


def _is_for_the_user(error: Exception) -> bool:
    """Errors that name what to change: of bad input, of files, and those that our packages define."""
    own = type(error).__module__.split(".")[0] in PACKAGES
    return own or isinstance(error, ValueError | OSError | ImportError)


def main() -> None:
    """Entry point. Errors of users are one message and exit code 2; `--debug` anywhere shows where they arose."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _set_up_logging(debug)
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        if debug or not _is_for_the_user(error):
            raise
        Console(stderr=True).print(Text(f"error: {error}"), Text("(--debug shows where)", "dim"), soft_wrap=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
