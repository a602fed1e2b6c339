"""Checks a teacher before anything starts: the student's tokens must be its own."""

from collections.abc import Iterator
from pathlib import Path

from llmquest_rl.data.tokenizer import load_tokenizer
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.hub import check_model_files
from llmquest_rl.models.checkpoint.load_save import read_shape

SHOWN = 3
"""Tokens that the error shows."""


def check_teacher(teacher: Path, student: Path, longest: int) -> None:
    """Check that the teacher is a complete language model whose tokens have the meaning of the student's.

    No weight is read.

    Args:
        teacher: The teacher's folder.
        student: The student's folder.
        longest: Tokens of the longest sequence that the student learns from.

    Raises:
        ValueError: a file or a tensor is missing, the model scores labels, has too few positions, or has another
            tokenizer; the message names both folders and some tokens that differ.
    """
    check_model_files(teacher)
    hf, shape = read_shape(teacher)
    if not issubclass(hf.model, CausalLM):
        raise ValueError(
            f"the teacher {teacher} is a {hf.architecture}, which predicts no tokens: use a language model"
        )
    if shape.max_positions < longest:
        raise ValueError(
            f"the teacher {teacher} supports {shape.max_positions} positions, but sequences may have {longest} tokens: "
            "lower data.max_prompt_tokens and rollout.sampling.max_tokens, or batch.tokens_per_sequence"
        )
    check_same_tokens(
        f"the teacher {teacher}",
        teacher,
        student,
        "A teacher judges the student's tokens one by one, so use a teacher with the same tokenizer, mostly a larger "
        "model of the same family",
    )


def check_same_tokens(name: str, other: Path, model: Path, remedy: str) -> None:
    """Check that two tokenizers give every token the same number.

    Args:
        name: the other model in the error.
        other: its folder.
        model: folder of the model that is trained.
        remedy: last sentence of the error, without its full stop.

    Raises:
        ValueError: they do not; the message shows some tokens that differ.
    """
    theirs, ours = ({i: t for t, i in load_tokenizer(path).get_vocab().items()} for path in (other, model))
    if theirs != ours:
        examples = "; ".join(_differences(theirs, ours))
        raise ValueError(
            f"{name} has another tokenizer than the model {model} ({len(theirs):,} and {len(ours):,} tokens): "
            f"{examples}. {remedy}"
        )


def _differences(theirs: dict[int, str], ours: dict[int, str]) -> Iterator[str]:
    differing = (i for i in sorted({*theirs, *ours}) if theirs.get(i) != ours.get(i))
    for _, i in zip(range(SHOWN), differing, strict=False):
        there, here = (repr(vocabulary[i]) if i in vocabulary else "missing" for vocabulary in (theirs, ours))
        yield f"token {i} is {there} there and {here} here"
