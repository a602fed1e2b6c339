"""Models without memory for their weights: to count, compare or load them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made within this context have parameters and buffers on the device `meta`: shapes, and no values."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`.

    A parameter on `meta` has no values to draw. torch runs such a function all the same, and for `normal_`, which every
    embedding calls, it imports its compiler: one to two seconds in each process that loads a model.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"]
        return func(*args, **given)
