"""The command `pipeline`: trains the stages of a file one after another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from trainer.cli.run_report import run_report
from trainer.cli.tools import all_passed

if TYPE_CHECKING:
    from trainer.config.schema import Config

console = Console()


def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file with `stages`, e.g. configs/rlhf.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE.KEY=VALUE",
            help="Options that replace those of one stage, e.g. rlhf.optimizer.lr=1e-5; `shared.KEY=VALUE` for all.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the stages that are not finished, as `train --dry-run` does.")
    ] = False,
) -> None:
    """Train several stages, e.g. those of RLHF. Finished stages are kept, and an interrupted one goes on.

    Every stage is checked before the first one starts.
    """
    from trainer.pipeline.stages import load_pipeline

    stages = load_pipeline(file, overrides or ())
    if not _check(stages, str(file), quiet=not dry_run):
        raise typer.Exit(1)
    if dry_run:
        return
    from trainer.pipeline.run import run_stages

    for stage in run_stages(stages, str(file), lambda line: console.rule(Text(line), align="left")):
        console.print(Text(f"{stage.name}: {stage.how}"), *map(Text, run_report(stage.run)), sep="\n", soft_wrap=True)


def _check(stages: dict[str, "Config"], origin: str, quiet: bool) -> bool:
    """Make the dry run of every stage that has no finished run; `quiet` prints failed checks only."""
    from trainer.pipeline.run import as_far_as_known, finished_stages

    kept = finished_stages(stages, origin)
    waiting = {name: config for name, config in stages.items() if name not in kept}
    if not waiting:
        return True
    from trainer.cli.dry_run import dry_run  # imports torch

    passed = True
    for name, config in waiting.items():
        if not quiet:
            console.print(Text(f"{name}:"))
        results = dry_run(as_far_as_known(config, stages, kept))
        passed &= all_passed(result for result in results if not (quiet and result.passed))
    return passed
