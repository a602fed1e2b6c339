"""Commands other than training: rewards, models, recipes, papers' curves and the check of the installation."""

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from trainer.cli.check_result import CheckResult

CHECKS, LISTS = "Check rewards, models and the installation", "Recipes, algorithms and papers"
"""Headings in `--help`, under which these commands are listed."""
console = Console()
tools = typer.Typer()


@tools.command(rich_help_panel=CHECKS)
def grade(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL file with the columns `completion`, `answer` and any others.")
    ],
    reward: Annotated[
        list[str],
        typer.Option(
            help="A built-in reward, module:function or path.py:function; options follow after commas, "
            "e.g. exact_number,tolerance=0.01. May be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL file to write: score, scores by name, failure, seconds.")],
    timeout_s: Annotated[float, typer.Option(help="Time limit in seconds for one reward on one row.")] = 5.0,
    memory_mb: Annotated[int, typer.Option(help="Memory limit in MiB for one row.")] = 1024,
    processes: Annotated[int, typer.Option(help="Number of worker processes.")] = 2,
) -> None:
    """Grade the completions in a file, to try a reward before training with it."""
    from rewards.config import GraderConfig
    from rewards.grade_file import grade_file, parse_reward

    limits = GraderConfig(timeout_s=timeout_s, memory_mb=memory_mb, processes=processes)
    summary = grade_file([parse_reward(text) for text in reward], file, out, limits)
    console.print(Text(f"{summary}\nscores: {out}"), soft_wrap=True)


@tools.command(rich_help_panel=CHECKS)
def parity(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a Hub id, or smollm2-135m-instruct.")],
    tolerance: Annotated[float, typer.Option(help="Maximum difference of a logit.")] = 1e-3,
) -> None:
    """Compare our float32 logits with those of transformers; exit code 1 above the tolerance."""
    from llmquest_rl.models.checkpoint.hub import resolve_model
    from llmquest_rl.models.checkpoint.parity import parity as compare

    report = compare(resolve_model(path))
    console.print(f"{report.architecture}: {report.positions} positions, largest logit {report.max_abs_logit:.1f}")
    console.print(
        f"largest difference: {report.max_abs_diff:.2e}, with a shared prompt: {report.max_abs_diff_shared:.2e}"
    )
    if not report.worst <= tolerance:  # also when it is NaN
        console.print(f"the largest difference is above the tolerance of {tolerance:g}")
        raise typer.Exit(1)


@tools.command(rich_help_panel=CHECKS)
def models(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATHS", help="config.json files, or folders with them; default: configs/models."),
    ] = None,
) -> None:
    """List the architectures and count the parameters of model configurations, without allocating them."""
    from llmquest_rl.models.architectures import architectures
    from llmquest_rl.models.checkpoint.count import config_files, count_parameters

    files = Table("architecture", "file", box=None)
    for name, hf in architectures().items():
        files.add_row(name, f"{hf.model.__module__.replace('.', '/')}.py")
    counts = Table("configuration", "architecture", "parameters", "active", "multi-token prediction", box=None)
    for path in config_files(paths or [Path("configs/models")]):
        count = count_parameters(path)
        numbers = (f"{number:,}" for number in (count.total, count.active, count.mtp))
        counts.add_row(Text(path.stem if path.is_file() else path.name), count.architecture, *numbers)
    console.print(files, "", counts, width=max(console.width, 120), crop=False)


@tools.command(rich_help_panel=CHECKS)
def assemble(
    vision: Annotated[
        str,
        typer.Argument(
            metavar="VISION", help="Vision Transformer: a model folder, a Hub id, or a config.json for random weights."
        ),
    ],
    language: Annotated[
        str,
        typer.Argument(
            metavar="LANGUAGE", help="Text decoder: a model folder, a Hub id, or a config.json for random weights."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; it must be new or empty.")],
    image_token: Annotated[
        str, typer.Option(help="A reserved token of the tokenizer that marks image positions, e.g. '<empty_output>'.")
    ],
    adapter: Annotated[str, typer.Option(help="Layer between vision model and decoder: linear or mlp.")] = "mlp",
    frozen: Annotated[
        list[str] | None,
        typer.Option(help="Weights to keep fixed in training, e.g. 'vision.*'; may be repeated."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A model whose tokenizer is used; default: that of LANGUAGE.")
    ] = None,
) -> None:
    """Combine a Vision Transformer and a text decoder into a vision-language model."""
    from llmquest_rl.models.checkpoint.count import count_parameters
    from trainer.cli.assemble_vlm import assemble_folder

    image_token_id = assemble_folder(vision, language, out, image_token, adapter, frozen or (), tokenizer)
    count = count_parameters(out)
    console.print(
        Text(f"model: {out}, {count.total:,} parameters; {image_token} (id {image_token_id}) marks image positions"),
        soft_wrap=True,
    )


@tools.command(rich_help_panel=LISTS)
def algorithms() -> None:
    """List the policy-gradient algorithms and the preference methods with their settings and papers."""
    from trainer.cli.algorithm_table import TABLE_WIDTH, algorithm_table, preference_table

    wide = Console(width=max(console.width, TABLE_WIDTH))
    wide.print("policy gradient: algorithm.name", algorithm_table(), sep="\n")
    wide.print("\npreferences: objective.method, with objective.name: preference", preference_table(), sep="\n")


@tools.command(rich_help_panel=LISTS)
def configs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with recipes.")] = Path("configs"),
) -> None:
    """List the recipes with a one-line description of each."""
    from trainer.config.recipes import recipes

    table = Table("recipe", "description", box=None)
    for path, line in recipes(folder):
        table.add_row(Text(str(path)), Text(line))
    console.print(table)


@tools.command(rich_help_panel=LISTS)
def reproduce(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A name in configs/papers, or a file; without one, the command lists them."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs (seeds) of each compared setting.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figure and the numbers; default: runs/papers/RECIPE.")
    ] = None,
) -> None:
    """Redraw a paper's curve with small models and check its claims; exit code 1 if one does not hold.

    Finished runs are kept in runs/papers and are not repeated.
    """
    from trainer.papers.recipe import FOLDER, find_recipe, load_recipe

    if recipe is None:
        configs(FOLDER)
        return
    path = find_recipe(recipe)
    load_recipe(path)  # a mistake in it is told before the imports that training needs
    from trainer.papers.reproduce import reproduce as run_recipe

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs, as Ctrl-C does
    report = run_recipe(path, seeds, out, lambda line: console.print(Text(line), soft_wrap=True))
    for verdict in report.verdicts:
        mark = Text("holds         ", "green") if verdict.holds else Text("does not hold ", "bold red")
        console.print(mark, Text(f"{verdict.says}\n    {verdict.numbers}"), soft_wrap=True)
    console.print(Text(f"figure: {report.figure}\nnumbers: {report.numbers}"), soft_wrap=True)
    if seeds < 3:
        console.print("fewer than three seeds: a difference between two settings may be due to chance")
    if not report.holds:
        failed = sum(not verdict.holds for verdict in report.verdicts)
        console.print(f"{failed} of {len(report.verdicts)} claims do not hold")
        raise typer.Exit(1)


@tools.command(rich_help_panel=CHECKS)
def doctor() -> None:
    """Check the installation: packages, engine and dtype that would be used, and a self-test of ten seconds."""
    from trainer.cli.doctor import run_checks

    if not all_passed(run_checks()):
        raise typer.Exit(1)


def all_passed(results: Iterable["CheckResult"]) -> bool:
    """Print each result as soon as its check is done; returns whether all checks passed."""
    passed = True
    for result in results:
        mark = Text("ok  ", "green") if result.passed else Text("FAIL", "bold red")
        console.print(mark, Text(f"{result.name}: {result.text}"), soft_wrap=True)
        passed &= result.passed
    return passed
