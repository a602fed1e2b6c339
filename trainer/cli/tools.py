"""The commands beside training: rewards, models, recipes, papers' curves, the installation."""

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from trainer.cli.check_result import Finding

console = Console()
tools = typer.Typer()


@tools.command()
def grade(
    file: Annotated[Path, typer.Argument(help="JSONL with `completion`, `answer` and any further columns.")],
    reward: Annotated[
        list[str], typer.Option(help="A built-in, module:function or path.py:function; options after commas.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write: score, scores by name, failure, seconds.")],
    timeout_s: Annotated[float, typer.Option(help="Limit for one reward of one row, in seconds.")] = 5.0,
    memory_mb: Annotated[int, typer.Option(help="Limit for one row, in MiB.")] = 1024,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 2,
) -> None:
    """Run rewards over a file: try a reward before it trains anything."""
    from rewards.config import GraderConfig
    from rewards.grade_file import grade_file, parse_reward

    limits = GraderConfig(timeout_s=timeout_s, memory_mb=memory_mb, processes=processes)
    summary = grade_file([parse_reward(text) for text in reward], file, out, limits)
    console.print(Text(f"{summary}\nwritten: {out}"), soft_wrap=True)


@tools.command()
def parity(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or smollm2-135m-instruct.")],
    tolerance: Annotated[float, typer.Option(help="Largest difference of a logit that passes.")] = 1e-3,
) -> None:
    """Compare our float32 logits with transformers'; exit code 1 above the tolerance."""
    from llmquest_rl.models.checkpoint.hub import resolve_model
    from llmquest_rl.models.checkpoint.parity import parity as compare

    report = compare(resolve_model(path))
    console.print(f"{report.architecture}: {report.positions} positions, largest logit {report.max_abs_logit:.1f}")
    console.print(
        f"largest difference: {report.max_abs_diff:.2e}, with a shared prompt: {report.max_abs_diff_shared:.2e}"
    )
    if not report.worst <= tolerance:  # also when it is NaN
        console.print(f"that is above the tolerance of {tolerance:g}")
        raise typer.Exit(1)


@tools.command()
def models(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="config.json files or folders; default: configs/models.")
    ] = None,
) -> None:
    """List the architectures, and the parameters that configurations mean, without allocating one."""
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


@tools.command()
def assemble(
    vision: Annotated[str, typer.Argument(help="A Vision Transformer: a folder, a Hub id, or a config.json.")],
    language: Annotated[str, typer.Argument(help="A decoder, the same; without weights a part's are random.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    image_token: Annotated[str, typer.Option(help="A reserved token of the tokenizer, e.g. '<empty_output>'.")],
    adapter: Annotated[str, typer.Option(help="Between the parts: linear or mlp.")] = "mlp",
    frozen: Annotated[
        list[str] | None, typer.Option(help="Weights that will not be trained, e.g. 'vision.*'; may be repeated.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A model whose tokenizer is taken; default: LANGUAGE's.")
    ] = None,
) -> None:
    """Make a vision-language model of two models, or of their configurations."""
    from llmquest_rl.models.checkpoint.count import count_parameters
    from trainer.cli.assemble_vlm import assemble_folder

    id_ = assemble_folder(vision, language, out, image_token, adapter, frozen or (), tokenizer)
    count = count_parameters(out)
    console.print(
        Text(f"written: {out}, {count.total:,} parameters; {image_token} (id {id_}) stands for a vision token"),
        soft_wrap=True,
    )


@tools.command()
def algorithms() -> None:
    """List the policy-gradient algorithms by their cells, each with its paper."""
    from trainer.cli.algorithm_table import TABLE_WIDTH, algorithm_table

    Console(width=max(console.width, TABLE_WIDTH)).print(algorithm_table())


@tools.command()
def configs(folder: Annotated[Path, typer.Argument(help="Where the recipes are.")] = Path("configs")) -> None:
    """List the recipes, each with what it shows."""
    from trainer.config.recipes import recipes

    table = Table("recipe", "what it shows", box=None)
    for path, line in recipes(folder):
        table.add_row(Text(str(path)), Text(line))
    console.print(table)


@tools.command()
def reproduce(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe of configs/papers, or a file; none lists them.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for figure and numbers; default: runs/papers/RECIPE.")
    ] = None,
) -> None:
    """Redraw a paper's curve at a small scale and check its claims; exit code 1 if one does not hold.

    Runs that ended are kept in runs/papers and not run again.
    """
    from trainer.papers.recipe import FOLDER, find_recipe
    from trainer.papers.reproduce import reproduce as run_recipe

    if recipe is None:
        configs(FOLDER)
        return
    path = find_recipe(recipe)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs, as Ctrl-C does
    report = run_recipe(path, seeds, out, lambda line: console.print(Text(line), soft_wrap=True))
    for verdict in report.verdicts:
        mark = Text("holds         ", "green") if verdict.holds else Text("does not hold ", "bold red")
        console.print(mark, Text(f"{verdict.says}\n    {verdict.numbers}"), soft_wrap=True)
    console.print(Text(f"figure: {report.figure}\nnumbers: {report.numbers}"), soft_wrap=True)
    if seeds < 3:
        console.print("fewer than three seeds: that an arm is above another one may well be chance")
    if not report.holds:
        failed = sum(not verdict.holds for verdict in report.verdicts)
        console.print(f"{failed} of {len(report.verdicts)} claims do not hold")
        raise typer.Exit(1)


@tools.command()
def doctor() -> None:
    """What is installed, which engine and dtype would be used and why, and a self-test of about ten seconds."""
    from trainer.cli.doctor import examine

    findings = list(printed(examine()))
    if not all(findings):
        raise typer.Exit(1)


def printed(findings: Iterable["Finding"]) -> Iterator[bool]:
    """Print each finding when it is made; yields whether it is good."""
    for finding in findings:
        mark = Text("ok  ", "green") if finding.passed else Text("FAIL", "bold red")
        console.print(mark, Text(f"{finding.name}: {finding.text}"), soft_wrap=True)
        yield finding.passed
