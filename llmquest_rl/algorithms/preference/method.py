"""A preference method: the variants that its cells name, and the settings of all of them, as one flat section."""

from functools import partial
from typing import Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from llmquest_rl.algorithms.preference.links import LINKS
from llmquest_rl.algorithms.preference.margins import MARGINS
from llmquest_rl.algorithms.unused_settings import Reader, readers_of_variants
from llmquest_rl.algorithms.variant import Cells, Weight, cell_field, known_variant, settings_of_variants
from llmquest_rl.options import Options

CELLS: Cells = {"margin": MARGINS, "link": LINKS}
"""The variants of each cell of a preference method by name."""


_cell = partial(cell_field, CELLS)


class SharedSettings(Options):
    """The cells, and the settings that do not belong to a single variant."""

    margin: str = _cell(
        "margin",
        "log_ratio",
        "Score of an answer. The margin of a pair is the score of its chosen answer minus that of the rejected one. "
        "Those without `ratio` in their name need no reference model.",
    )
    link: str = _cell("link", "sigmoid", "Loss of a pair, from the scores of its answers. `kto` needs no pairs.")
    pair_weight: Weight = 1.0
    """Weight of that loss; below 1 if the answers' own loss counts more (lambda of ORPO)."""
    nll_weight: Weight = 0.0
    """Weight of the negative log-prob of the chosen answers, which keeps them likely (RPO, CPO, ORPO); 0 = none."""
    nll_mean: Literal["token", "answer"] = "token"
    """Mean of that term. `token`: every token of the chosen answers counts the same. `answer`: every answer does."""

    @field_validator(*CELLS)
    @classmethod
    def _is_a_variant(cls, name: str, info: ValidationInfo) -> str:
        return known_variant(CELLS, str(info.field_name), name)

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.pair_weight == self.nll_weight == 0:
            raise ValueError("pair_weight and nll_weight are both 0: nothing is left to learn from")
        if self.link == "kto" and self.margin != "log_ratio":
            raise ValueError("kto estimates a KL to the reference model, so margin must be log_ratio")
        return self


class Method(*settings_of_variants(CELLS, SharedSettings), SharedSettings):  # type: ignore[misc]
    """One row: the cells of a preference method, with the settings of every variant that they can name."""

    @property
    def needs_reference(self) -> bool:
        """Whether the margin compares the policy with a reference model."""
        return MARGINS[self.margin].has_reference

    @property
    def takes_pairs(self) -> bool:
        """Whether the loss compares the two answers of a pair; otherwise every answer has a loss of its own."""
        return LINKS[self.link].takes_pairs


READERS: dict[str, Reader] = {
    "nll_mean": Reader("an nll_weight above 0", lambda method: method.nll_weight > 0),
    **dict(readers_of_variants(CELLS)),
}
"""The condition under which each setting is read, by its name; a setting that is missing here always is."""
