"""The command line. Each command parses its arguments and calls one function; heavy imports stay inside commands."""

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

from trainer.cli.calibration import calibration
from trainer.cli.pipeline import pipeline
from trainer.cli.positions import positions_app
from trainer.cli.run_report import run_report
from trainer.cli.tools import all_passed, tools

if TYPE_CHECKING:
    from trainer.config.schema import Config

PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")
USER_ERROR = 2
"""Exit code after an error that the user can fix."""
PANEL = "Train and use models"
"""Heading in `--help`, under which these commands are listed."""
console = Console()
app = typer.Typer(
    help="Train language models with reinforcement learning, pretraining or supervised fine-tuning.",
    epilog="Start with: llmquest-rl train configs/quickstart.yaml. `llmquest-rl COMMAND --help` explains a command, "
    "and --debug after any command shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tools)
app.add_typer(positions_app)

Recipe = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A recipe (YAML), e.g. configs/quickstart.yaml; `configs` lists them."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options that replace those of the file, e.g. optimizer.lr=1e-5"),
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A recipe (YAML), or a run folder: its configuration with the model that the run trained.",
    ),
]
Checkpoint = Annotated[str, typer.Option(help="Checkpoint of the run: latest, best, or the number of a step.")]
RunReference = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, runs/NAME for the newest run of that name, or runs/latest.")
]


@app.command(rich_help_panel=PANEL)
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run with this recipe's name.")] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check configuration, model files, data and rewards, then exit.")
    ] = False,
    replay: Annotated[
        Path | None, typer.Option(help="Train on the rollouts saved in this folder instead of sampling.")
    ] = None,
) -> None:
    """Train a model with a recipe; writes to runs/NAME/START and prints the held-out result at the end."""
    from trainer.config.sizes import sizes_table

    config = _load(recipe, overrides)
    console.print(sizes_table(config))
    if dry_run:
        _print_checks(config)
        return
    from trainer.loop import train as run_training
    from trainer.run.folder import RunFolder

    resume_path = RunFolder.open(resume_from or f"runs/{config.name}").path if resume or resume_from else None
    console.print(*map(Text, run_report(run_training(config, resume_path, replay))), sep="\n", soft_wrap=True)


app.command(rich_help_panel=PANEL)(pipeline)
app.command(rich_help_panel=PANEL)(calibration)


@app.command(name="eval", rich_help_panel=PANEL)
def evaluate(
    source: Source,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Evaluate a model on held-out data: accuracy, mean@k and pass@k with 95 % confidence intervals."""
    config = _load_for_sampling(source, checkpoint, overrides)
    from trainer.inference import evaluate as run_evaluation

    metrics, groups = run_evaluation(config)
    for key in sorted(key for key in metrics if not key.endswith(("_low", "_high"))):
        interval = f"  [{metrics[f'{key}_low']:.4f}, {metrics[f'{key}_high']:.4f}]" if f"{key}_low" in metrics else ""
        console.print(Text(f"{key.removeprefix('eval/')}: {metrics[key]:.4f}{interval}"))
    console.print(f"held-out problems: {len(groups)}")


@app.command(rich_help_panel=PANEL)
def generate(
    source: Source,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be repeated.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Number of completions of each prompt.")] = 1,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Answer prompts with the model of a recipe or a run; `rollout.sampling` sets temperature and length."""
    config = _load_for_sampling(source, checkpoint, overrides)
    from trainer.inference import answer_prompts

    for question, answers in zip(prompt, answer_prompts(config, prompt, samples), strict=True):
        for answer in answers:
            console.print(Text(f"{question}\n", "dim"), Text(answer), soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def rollout(
    source: Source,
    out: Annotated[Path, typer.Option(help="Output folder; `train --replay` reads it.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Number of steps; each samples batch.prompts_per_step prompts.")] = 1,
    checkpoint: Checkpoint = "latest",
) -> None:
    """Sample and grade completions without training, and save them as rollouts."""
    config = _load_for_sampling(source, checkpoint, overrides)
    from trainer.inference import generate_rollouts

    for step, groups in generate_rollouts(config, steps, out):
        values = [score.value for group in groups for score in group.scores if score.value is not None]
        mean = f"{sum(values) / len(values):.4f}" if values else "none"
        console.print(f"step {step}: {len(groups)} prompts, {len(values)} scored completions, mean reward {mean}")
    console.print(Text(f"rollouts: {out}"), soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def export(
    run: RunReference,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; it must be new or empty.")],
    checkpoint: Checkpoint = "latest",
) -> None:
    """Copy the trained model of a run into a folder that transformers, vLLM and the Hub can load."""
    from trainer.run.trained import export as export_model

    console.print(Text(f"model: {export_model(run, out, checkpoint)}"), soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUNS", help="Run folders, or runs/NAME for the newest run of a name.")
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="A key of metrics.jsonl, e.g. reward/mean; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .png or .svg file; default: plot.png in the first run.")] = None,
    group_seeds: Annotated[
        bool, typer.Option(help="Draw runs that differ only in the seed as one curve with a band.")
    ] = False,
) -> None:
    """Draw the metrics of one or several runs over their steps."""
    from trainer.run.plot import plot_runs

    console.print(f"plot: {plot_runs(runs, metric or (), out, group_seeds)}", soft_wrap=True)


# Commands load the configuration first and import what they run afterwards, so that a mistyped key is told at once.


def _load(path: Path, overrides: Iterable[str] | None) -> "Config":
    from trainer.config.load import load_config

    return load_config(path, overrides or ())


def _load_for_sampling(source: Path, checkpoint: str, overrides: Iterable[str] | None) -> "Config":
    """The configuration of a recipe, or of a run with the model that the run trained."""
    if source.suffix in (".yaml", ".yml"):
        return _load(source, overrides)
    from trainer.run.folder import RunFolder
    from trainer.run.trained import trained_model

    model = json.dumps(str(trained_model(str(source), checkpoint)))
    return _load(RunFolder.open(source).config, [f"model.path={model}", "model.init=pretrained", *(overrides or ())])


def _print_checks(config: "Config") -> None:
    from trainer.cli.dry_run import dry_run

    if not all_passed(dry_run(config)):
        raise typer.Exit(1)
    console.print("dry run: configuration, model files, data and rewards are fine")


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=debug, show_time=False)],
    )
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.INFO)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message is enough to fix the cause: invalid input, files, and errors of our own packages."""
    own = type(error).__module__.split(".")[0] in PACKAGES
    return own or isinstance(error, ValueError | OSError | ImportError)


def main() -> None:
    """Run the command line. A user's error prints one message and exits with 2; `--debug` adds its traceback."""
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
        hint = Text("(--debug shows the traceback)", "dim")
        Console(stderr=True).print(Text(f"error: {error}"), hint, sep="\n", soft_wrap=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
