"""The names and layouts of a model's weights on disk: `HFMap`, the table at the end of each architecture's file.

A tensor on disk is always a view of one of our weights: the weight under another name, its transpose, or one expert of
a stack. So the same table reads and writes: loading fills the views of empty weights, saving writes the views of
trained ones.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmquest_rl.models.base import Model, ModelConfig
from llmquest_rl.models.serving import VllmLimits

View = Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """One tensor on disk, as a view of one of our weights."""

    ours: str
    """The name of our parameter or buffer."""
    view: View
    """Takes our weight and returns the tensor on disk, without a copy."""


@dataclass(frozen=True)
class Renamed:
    """A weight that has another module path on disk."""

    path: str

    def pieces(self, ending: str, shape: tuple[int, ...]) -> dict[str, View]:
        """Return the view for each tensor on disk, by its name there.

        Args:
            ending: The last part of our weight's name, such as `weight` or `bias`.
            shape: The shape of our weight.
        """
        return {f"{self.path}.{ending}": _itself}


@dataclass(frozen=True)
class Transposed:
    """A layer whose matrices are transposed on disk, as in GPT-2's Conv1D; its vectors are not."""

    path: str

    def pieces(self, ending: str, shape: tuple[int, ...]) -> dict[str, View]:
        """See `Renamed.pieces`."""
        return {f"{self.path}.{ending}": Tensor.t if len(shape) == 2 else _itself}


@dataclass(frozen=True)
class Experts:
    """A stack `[experts, parts * rows, columns]` that is saved as one matrix `[rows, columns]` per expert and part."""

    path: str
    """Module path of one expert on disk, with `{e}` for its index."""
    parts: tuple[str, ...]
    """Names of an expert's modules on disk, in the order of our rows."""
    fused: str = ""
    """Key of the whole stack in files that are not split by expert: such files are read, but never written."""

    def pieces(self, ending: str, shape: tuple[int, ...]) -> dict[str, View]:
        """See `Renamed.pieces`."""
        rows = shape[1] // len(self.parts)
        return {
            f"{self.path.replace('{e}', str(expert))}.{part}.weight": _rows_of(expert, i * rows, (i + 1) * rows)
            for expert in range(shape[0])
            for i, part in enumerate(self.parts)
        }


Form = Renamed | Transposed | Experts


@dataclass(frozen=True)
class HFMap:
    """An architecture: its classes, the names of its weights on disk, its classifier, and its limits in vLLM.

    The file of each architecture ends with one, named `HF`; `architectures` finds it there.
    """

    architecture: str
    """The name on the Hub, as in `architectures` of config.json."""
    config: type[ModelConfig]
    model: type[Model]
    names: Mapping[str, str | Form] | Callable[[Any], Mapping[str, str | Form]]
    """The path on disk for each of our module paths, or for the full name of one weight; a string means `Renamed`.
    `{i}` is replaced by the index of the layer, `{n+i}` by the number of layers plus that index. A function of the
    configuration may return the table instead."""
    ignored: tuple[str, ...] = ()
    """Shell patterns of keys that occur in files and are not weights of the model."""
    prefix: str = ""
    """The beginning of the keys in most files; a file whose keys lack it is read, too."""
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """The keys that repeat another key's tensor, each with that key, for a configuration. Copies may be missing when a
    file is read; otherwise they must be equal. They are written again."""
    fit: Callable[[Any, Collection[str]], Any] = lambda config, keys: config
    """Adapts the configuration to the keys that a file holds: some tools leave out weights that config.json names."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Advice for architectures on the Hub that contain this one as a part and are not implemented, by their names."""
    classifier: str | None = None
    """The name on the Hub of the text classifier that is made of this decoder; None = none is made of it."""
    vllm: VllmLimits | None = None
    """The configurations that vLLM serves; None = vLLM does not serve this architecture."""

    def table(self, config: Any) -> Mapping[str, str | Form]:
        """Return `names` for a configuration."""
        return self.names(config) if callable(self.names) else self.names


def module_maps(module: ModuleType) -> dict[str, HFMap]:
    """Return the maps of a file by their names on the Hub: `HF`, or those that its function `hf_maps` returns."""
    if hasattr(module, "HF"):
        return {module.HF.architecture: module.HF}
    return module.hf_maps() if hasattr(module, "hf_maps") else {}


def hf_map(model: Model) -> HFMap:
    """Return the map at the end of the file that defines the model's class."""
    found = module_maps(sys.modules[type(model).__module__])
    return found[model.config.architecture] if len(found) > 1 else next(iter(found.values()))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor of every weight in a checkpoint: parameters, a shared one once, and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def disk_pieces(model: Model, tied: bool = False) -> dict[str, Piece]:
    """Return the tensors on disk by their names, in the order of the model, copies last.

    Args:
        model: The model.
        tied: Also return the second names of shared parameters.
    """
    table = _Table(model)
    weights = [*model.named_parameters(remove_duplicate=not tied), *model.named_buffers()]
    pieces = {
        disk: Piece(name, view)
        for name, tensor in weights
        for disk, view in table.pieces(name, tuple(tensor.shape)).items()
    }
    return pieces | {copy: pieces[key] for copy, key in hf_map(model).copies(model.config).items()}


def fused_pieces(model: Model) -> dict[str, Piece]:
    """Return the whole stacks of experts by their names on disk, for files that are not split by expert."""
    table = _Table(model)
    found = {name: table.form(name) for name, _ in model.named_parameters()}
    return {
        form.fused: Piece(name, _itself) for name, form in found.items() if isinstance(form, Experts) and form.fused
    }


def disk_tensors(model: Model, named: Iterable[tuple[str, Tensor]] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield pairs (name on disk, tensor), a shared parameter once, for `save_model` and for rollout engines.

    Args:
        model: The model that defines the names and layouts.
        named: Pairs (our name, tensor) to use instead of the model's own weights: gathered shards, master weights or
            gradients.
    """
    table, wanted = _Table(model), {name for name, _ in named_weights(model)}
    copies: dict[str, list[str]] = {}
    for copy, key in hf_map(model).copies(model.config).items():
        copies.setdefault(key, []).append(copy)
    for name, tensor in named_weights(model) if named is None else named:
        if name not in wanted:  # a second name of a shared parameter
            continue
        # Use the shapes of the given tensors: with ZeRO-3 a parameter is empty between forward passes.
        for disk, view in table.pieces(name, tuple(tensor.shape)).items():
            for key in (disk, *copies.get(disk, ())):
                yield key, view(tensor.detach())


class _Table:
    """The rows of a map for one model, with layer indices filled in."""

    def __init__(self, model: Model) -> None:
        self._hf = hf_map(model)
        self._names = self._hf.table(model.config)
        self._num_layers = int(getattr(model.config, "num_layers", 0))

    def form(self, name: str) -> Form:
        """Return the row for one of our weights, with its layer index filled in."""
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        whole = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name, count=1)
        row = self._names.get(whole, self._names.get(whole.rpartition(".")[0]))
        assert row is not None, f"{name} is not in the names of {self._hf.architecture}"
        i = int(number[0]) if number else 0
        return _filled(row, {"{i}": str(i), "{n+i}": str(self._num_layers + i)})

    def pieces(self, name: str, shape: tuple[int, ...]) -> dict[str, View]:
        """Return the views of one of our weights by their names on disk."""
        return self.form(name).pieces(name.rpartition(".")[2], shape)


def _filled(row: str | Form, values: Mapping[str, str]) -> Form:
    def fill(text: str) -> str:
        for mark, value in values.items():
            text = text.replace(mark, value)
        return text

    if isinstance(row, str):
        return Renamed(fill(row))
    if isinstance(row, Experts):
        return Experts(fill(row.path), row.parts, fill(row.fused))
    return Transposed(fill(row.path))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _rows_of(expert: int, start: int, stop: int) -> View:
    def view(stack: Tensor) -> Tensor:
        return stack[expert, start:stop]

    return view
