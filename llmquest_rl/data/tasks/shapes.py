"""Questions about small pictures of coloured shapes: generated, endless, offline, with one-word answers.

The program that draws a picture also knows its content, as in CLEVR (Johnson et al. 2017, arXiv:1612.06890, section
3). Here the solids are circles, squares and triangles on a plane.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw
from pydantic import PositiveInt, field_validator, model_validator

from llmquest_rl.data.rows import DataError, MalformedRows, Row
from llmquest_rl.data.task import Draw, Task, generated_task
from llmquest_rl.options import Options

Shape = Literal["circle", "square", "triangle"]
Colour = Literal["red", "green", "blue", "yellow", "white"]

RGB = tuple[int, int, int]
COLOURS: dict[Colour, RGB] = {
    "red": (230, 40, 40),
    "green": (40, 200, 40),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "white": (255, 255, 255),
}
"""Colours of the shapes; the background is black."""
SMALLEST_CELL = 8
"""Smallest width of a cell in pixels: in a smaller cell the shapes cannot be distinguished."""


class Config(Options):
    """The pictures, and the questions about them."""

    ask: Literal["colour", "shape", "count"] = "count"
    """The question: the colour of the only shape, the kind of the only shape, or the number of shapes of one kind."""
    size: PositiveInt = 32
    """Height and width of a picture in pixels; it is resized to the size that the model reads."""
    most: PositiveInt = 4
    """Maximum number of shapes in a picture with the question `count`; the answer lies between 0 and this."""
    shapes: tuple[Shape, ...] = ("circle", "square", "triangle")
    """Kinds of shapes that are drawn."""
    colours: tuple[Colour, ...] = ("red", "green", "blue", "yellow")
    """Colours of the shapes; `white` is available, too."""
    template: str = "{question}"
    """The prompt; `{question}` is replaced by the question. `<image>` marks the place of the picture, which otherwise
    comes first."""
    held_out: PositiveInt = 100
    """Distinct pictures set aside for evaluation."""

    @field_validator("shapes", "colours")
    @classmethod
    def _some(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("name at least one")
        return values

    @model_validator(mode="after")
    def _has_room(self) -> "Config":
        if "{question}" not in self.template:
            raise ValueError("`template` must contain {question}")
        if self.size < SMALLEST_CELL * self.cells:
            raise ValueError(
                f"pictures of {self.size} pixels have no room for {self.most} shapes: "
                f"set `size` to at least {SMALLEST_CELL * self.cells}"
            )
        return self

    @property
    def cells(self) -> int:
        """Number of cells in each row and column of a picture; a cell holds one shape at most."""
        return math.ceil(math.sqrt(self.most)) if self.ask == "count" else 1


@dataclass(frozen=True, slots=True, order=True)
class Drawn:
    """One shape of a picture."""

    shape: Shape
    colour: Colour
    x: int
    y: int
    """The centre, in pixels."""
    radius: int
    """Half of the width and of the height, in pixels."""


@dataclass(frozen=True, slots=True)
class Question:
    """A picture with a question about it."""

    drawn: list[Drawn]
    text: str
    answer: str


def load(config: Config, seed: int, malformed: MalformedRows) -> Task:
    """Open the task. The same question about another picture is another problem.

    Raises:
        DataError: the options allow a single picture only.
    """
    make = ASK[config.ask]

    def draw(index: int) -> Draw:
        question = make(config, random.Random(f"{seed}/{index}"))
        prompt = config.template.replace("{question}", question.text)
        row = Row(str(index), prompt, question.answer, images=(picture(question.drawn, config.size),))
        return Draw(row, f"{question.text} {sorted(question.drawn)}")

    try:
        return generated_task("shapes", draw, config.held_out, seed)
    except DataError as error:
        raise DataError(f"{error} (size: {config.size}, shapes: {config.shapes})") from error


def picture(drawn: list[Drawn], size: int) -> Image.Image:
    """The shapes on black, in an RGB image of `size` x `size` pixels."""
    image = Image.new("RGB", (size, size))
    canvas = ImageDraw.Draw(image)
    for item in drawn:
        SHAPES[item.shape](canvas, item, COLOURS[item.colour])
    return image


def _circle(canvas: ImageDraw.ImageDraw, item: Drawn, fill: RGB) -> None:
    canvas.circle((item.x, item.y), item.radius, fill)


def _square(canvas: ImageDraw.ImageDraw, item: Drawn, fill: RGB) -> None:
    canvas.rectangle((item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius), fill)


def _triangle(canvas: ImageDraw.ImageDraw, item: Drawn, fill: RGB) -> None:
    bottom = item.y + item.radius
    corners = [(item.x, item.y - item.radius), (item.x + item.radius, bottom), (item.x - item.radius, bottom)]
    canvas.polygon(corners, fill=fill)


SHAPES: dict[Shape, Callable[[ImageDraw.ImageDraw, Drawn, RGB], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


def _only_shape(config: Config, rng: random.Random) -> Drawn:
    return _place(rng.choice(config.shapes), 0, config, rng)


def _colour(config: Config, rng: random.Random) -> Question:
    only = _only_shape(config, rng)
    return Question([only], "What colour is the shape? Reply with the colour only.", only.colour)


def _shape(config: Config, rng: random.Random) -> Question:
    only = _only_shape(config, rng)
    return Question([only], "Which shape is this? Reply with one word.", only.shape)


def _count(config: Config, rng: random.Random) -> Question:
    """A question with equally likely answers; shapes of other kinds take part of the remaining room."""
    asked = rng.choice(config.shapes)
    others = [shape for shape in config.shapes if shape != asked]
    answer = rng.randint(0, config.most)
    rest = rng.randint(0, config.most - answer) if others else 0
    shapes = [asked] * answer + [rng.choice(others) for _ in range(rest)]
    cells = rng.sample(range(config.cells**2), len(shapes))
    drawn = [_place(shape, cell, config, rng) for shape, cell in zip(shapes, cells, strict=True)]
    return Question(drawn, f"How many {asked}s are there? Reply with the number only.", str(answer))


ASK: dict[str, Callable[[Config, random.Random], Question]] = {"colour": _colour, "shape": _shape, "count": _count}


def _place(shape: Shape, cell: int, config: Config, rng: random.Random) -> Drawn:
    """The shape somewhere in a cell, numbered row by row; shapes of neighbouring cells do not touch."""
    width = config.size // config.cells
    row, column = divmod(cell, config.cells)
    radius = rng.randint(width // 4, width // 2 - 2)
    room = range(radius + 1, width - radius - 1)
    x, y = column * width + rng.choice(room), row * width + rng.choice(room)
    return Drawn(shape, rng.choice(config.colours), x, y, radius)
