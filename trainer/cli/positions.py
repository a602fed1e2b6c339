"""`llmquest-rl positions`: shows which tokens of a text a proxy model finds hard to predict."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmquest_rl.data.positions import ScoredText
    from trainer.config.schema import Config

STYLES = {"easy": "green", "medium": "yellow", "hard": "bold red"}
"""Colour by difficulty; tokens that are easier than `easy`, and tokens that are no position, are dim."""
BAR = 40
"""Width of the longest bar of the histogram, in characters."""
BIN = 0.25
"""Width of a bin of the histogram, in nats."""
SHOWN = 3
"""Number of likely tokens in the table."""
positions_app = typer.Typer()
console = Console()


@positions_app.command(rich_help_panel="Check rewards, models and the installation")
def positions(
    recipe: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A recipe (YAML) with the task next_token_reasoning.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options that replace those of the file, e.g. data.task.split=test"),
    ] = None,
    texts: Annotated[int, typer.Option(min=0, help="Number of texts, or parts of long ones, to print.")] = 5,
    table: Annotated[
        bool, typer.Option("--table", help="List every token with its entropy and the proxy's best guesses.")
    ] = False,
) -> None:
    """Compute the entropies of a recipe's text, keep them for training, and print the text coloured by difficulty."""
    from trainer.config.load import load_config

    for part in show_positions(load_config(recipe, overrides or ()), texts, table):
        console.print(part, soft_wrap=True)


def show_positions(config: "Config", count: int, table: bool) -> Iterator[RenderableType]:
    """The first training texts of a configuration, and the distribution of all their entropies.

    Raises:
        ValueError: the recipe has no task next_token_reasoning, or its text cannot be scored.
    """
    from llmquest_rl.data.positions import describe_entropies, entropies_of
    from llmquest_rl.data.rows import MalformedRows
    from llmquest_rl.data.tasks import next_token_reasoning
    from trainer.components import RunComponents

    section = config.data.task
    if section is None or section.name != "next_token_reasoning":
        name = None if section is None else section.name
        raise ValueError(f"only the task next_token_reasoning has positions; data.task is {name or 'not set'}")
    proxy = RunComponents(config).open_proxy(section.options.proxy)
    malformed = MalformedRows(config.data.malformed_rows)
    train, held_out = next_token_reasoning.scored_sides(section.options, config.seed, malformed, proxy)
    for text in train[:count]:
        yield Text(text.id, "dim")
        yield coloured(text)
        if table:
            yield _token_table(text, proxy.token_text)
    yield Text.assemble("\nabove 0.5: ", ("easy", STYLES["easy"]), ", above 1.0: ", ("medium", STYLES["medium"]))
    yield Text.assemble("above 1.5: ", ("hard", STYLES["hard"]), " (nats of the proxy's 16 most likely tokens)\n")
    entropies = entropies_of(train)
    yield _histogram(entropies.tolist())
    yield Text(f"training text: {describe_entropies(entropies)}")
    yield Text(f"held-out text: {describe_entropies(entropies_of(held_out))}")


def coloured(text: "ScoredText") -> Text:
    """A text whose tokens have the colours of their difficulty."""
    shown = Text(text.text, "dim")
    for position in text.positions:
        difficulty = _difficulty(float(text.scores.entropies[position]))
        if difficulty is not None:
            begin = text.ends[position - 1]
            end = next(end for end in text.ends[position:] if end > begin)
            shown.stylize(f"not dim {STYLES[difficulty]}", begin, end)
    return shown


def _difficulty(entropy: float) -> str | None:
    """The hardest difficulty that a position has; None = it is easier than easy."""
    from llmquest_rl.data.positions import DIFFICULTIES

    return next((name for name, limit in reversed(DIFFICULTIES.items()) if entropy > limit), None)


def _token_table(text: "ScoredText", token_text: Callable[[int], str]) -> Table:
    made = Table("token", "entropy", "difficulty", "the proxy's most likely tokens", box=None)
    for position in text.positions:
        entropy = float(text.scores.entropies[position])
        likely = zip(text.scores.top_ids[position][:SHOWN], text.scores.top_probs[position][:SHOWN], strict=True)
        guesses = ", ".join(f"{token_text(int(id_))!r} {prob:.2f}" for id_, prob in likely)
        made.add_row(
            Text(repr(token_text(text.ids[position]))), f"{entropy:.3f}", _difficulty(entropy) or "", Text(guesses)
        )
    return made


def _histogram(entropies: Sequence[float]) -> Table:
    """Number of positions in each quarter of a nat."""
    counts = Counter(int(entropy / BIN) for entropy in entropies)
    most = max(counts.values(), default=1)
    made = Table("entropy", "positions", "", box=None)
    for bin_ in range(max(counts, default=-1) + 1):
        bar = "█" * round(BAR * counts[bin_] / most)
        style = STYLES.get(_difficulty((bin_ + 0.5) * BIN) or "", "dim")
        made.add_row(f"{bin_ * BIN:.2f} to {(bin_ + 1) * BIN:.2f}", f"{counts[bin_]:,}", Text(bar, style))
    return made
