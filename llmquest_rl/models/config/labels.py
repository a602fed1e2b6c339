"""The names of a classifier's labels in config.json, and the tokens at which a reward model is read."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from llmquest_rl.types import Pooling

POOLING = "score_pooling"
"""Our own field of config.json; other software ignores it."""


def read_labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels of a config.json in the order of their indices.

    As in transformers, there are two labels if the file has neither names nor a number.

    Raises:
        ValueError: `num_labels` contradicts `id2label`, or the indices of the names are not 0, 1, 2, ...
    """
    named = values.get("id2label")
    number = int(values.get("num_labels", 2 if named is None else len(named)))
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(number))
    if len(named) != number:
        raise ValueError(f"config.json has num_labels {number}, but {len(named)} names in id2label")
    by_number = {int(i): str(name) for i, name in named.items()}
    if sorted(by_number) != list(range(number)):
        raise ValueError(f"config.json numbers its id2label {sorted(by_number)}: expected 0 to {number - 1}")
    return tuple(by_number[i] for i in range(number))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of config.json from which transformers reads these labels."""
    return {
        "num_labels": len(labels),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def read_pooling(values: Mapping[str, Any]) -> Pooling | None:
    """Return the pooling that a config.json states; None = it states none.

    Raises:
        ValueError: the pooling is unknown.
    """
    found: Pooling | None = values.get(POOLING)
    if found is not None and found not in get_args(Pooling):
        raise ValueError(f"config.json has {POOLING} {found!r}: expected one of {', '.join(get_args(Pooling))}")
    return found


def pooling_fields(pooling: Pooling | None) -> dict[str, Any]:
    """Return the field of config.json that states a pooling."""
    return {} if pooling is None else {POOLING: pooling}
