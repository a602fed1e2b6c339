"""Generated sums: endless, offline, and easy enough for a small model to improve on within minutes."""

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator

from llmquest_rl.data.rows import DataError, MalformedRows, Row
from llmquest_rl.data.task import Draw, Task, generated_task
from llmquest_rl.options import Options

Operation = Literal["+", "-", "*"]


class Config(Options):
    """The sums, and the prompt that asks for them."""

    digits: PositiveInt = 2
    """Decimal digits of every operand; one-digit operands include 0."""
    terms: PositiveInt = 2
    """Operands of each sum, at least 2."""
    operations: tuple[Operation, ...] = ("+",)
    """Operations to draw from, for every place between two operands; `*` binds first, as usual."""
    template: str = "What is {question}? Reply with the number only."
    """The prompt; `{question}` is replaced by the sum, e.g. `12 + 7`."""
    held_out: PositiveInt = 100
    """Distinct problems set aside for evaluation; at most a quarter of a small space (one-digit sums)."""
    noise_digits: NonNegativeInt = 0
    """Random digits behind every answer, after a semicolon: text that no model can predict. With the task
    `next_token_reasoning` it shows what noise does; rewards that read a number need 0."""

    @field_validator("terms")
    @classmethod
    def _at_least_two(cls, terms: int) -> int:
        if terms < 2:
            raise ValueError("a sum needs at least 2 terms")
        return terms

    @field_validator("operations")
    @classmethod
    def _some_operation(cls, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if not operations:
            raise ValueError("name at least one of '+', '-', '*'")
        return operations

    @field_validator("template")
    @classmethod
    def _shows_the_question(cls, template: str) -> str:
        if "{question}" not in template:
            raise ValueError("it must contain {question}")
        return template


def evaluate(operands: Sequence[int], operators: Sequence[str]) -> int:
    """The value of a sum, products first."""
    total, product = 0, operands[0]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "*":
            product *= operand
        else:
            total, product = total + product, operand if operator == "+" else -operand
    return total + product


def load(config: Config, seed: int, malformed: MalformedRows) -> Task:
    """Open the task. Sums that differ in the order of their operands only are one problem, e.g. 3 + 5 and 5 + 3."""
    low = 0 if config.digits == 1 else 10 ** (config.digits - 1)
    high = 10**config.digits - 1

    def draw(index: int) -> Draw:
        rng = random.Random(f"{seed}/{index}")
        operands = [rng.randint(low, high) for _ in range(config.terms)]
        operators = [rng.choice(config.operations) for _ in range(config.terms - 1)]
        steps = zip(operators, operands[1:], strict=True)
        question = str(operands[0]) + "".join(f" {operator} {operand}" for operator, operand in steps)
        commutes = set(operators) in ({"+"}, {"*"})
        key = f" {operators[0]} ".join(map(str, sorted(operands))) if commutes else question
        noise = "".join(rng.choice("0123456789") for _ in range(config.noise_digits))
        answer = f"{evaluate(operands, operators)}{noise and f';{noise}'}"
        row = Row(question, config.template.replace("{question}", question), answer)
        return Draw(row, key)

    try:
        return generated_task("arithmetic", draw, config.held_out, seed)
    except DataError as error:
        raise DataError(f"{error} (digits: {config.digits}, terms: {config.terms})") from error
