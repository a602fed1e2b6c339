"""How a model's weights are called and laid out on disk: the table that each architecture file ends with, and its use.

A tensor on disk is always a view of one of ours (a renamed one, a transposed one, one expert of a stack), so the same
table reads and writes: a view of an empty parameter is filled, a view of a trained one is saved or sent to an engine.
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
    """One tensor on disk."""

    ours: str
    """The parameter or buffer of ours that it is a view of."""
    view: View


@dataclass(frozen=True)
class Renamed:
    """The same tensor under another module path."""

    path: str

    def pieces(self, ending: str, shape: tuple[int, ...]) -> dict[str, View]:
        """Name on disk to view, for our weight with this `ending` and `shape`."""
        return {f"{self.path}.{ending}": _itself}


@dataclass(frozen=True)
class Transposed:
    """Matrices lie transposed on disk, as GPT-2's Conv1D keeps them; vectors do not."""

    path: str

    def pieces(self, ending: str, shape: tuple[int, ...]) -> dict[str, View]:
        """See `Renamed.pieces`."""
        return {f"{self.path}.{ending}": Tensor.t if len(shape) == 2 else _itself}


@dataclass(frozen=True)
class Experts:
    """A stack [experts, parts * rows, columns] that lies on disk as one matrix for each expert and part."""

    path: str
    """Module path of one expert, with `{e}` for its number."""
    parts: tuple[str, ...]
    """Modules of an expert, in the order of our rows."""
    fused: str = ""
    """Key of the whole stack in files that keep it so: read, never written."""

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
    """How an architecture lies on disk. Each architecture file ends with one, named `HF` (see `module_maps`)."""

    architecture: str
    """As in `architectures` of config.json."""
    config: type[ModelConfig]
    model: type[Model]
    names: Mapping[str, str | Form] | Callable[[Any], Mapping[str, str | Form]]
    """Our module path, or the whole path of one weight, to the path on disk (a string means `Renamed`); a function of
    the config where that decides. `{i}` stands for a layer's number, `{n+i}` for it counted on from the last layer."""
    ignored: tuple[str, ...] = ()
    """Shell patterns of keys that files carry and that hold no weights of ours."""
    prefix: str = ""
    """Begins the keys of most files; a file without it is read too."""
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """Keys on disk that repeat another one, to the key that they repeat: they may be missing, are compared, and are
    written again."""
    fit: Callable[[Any, Collection[str]], Any] = lambda config, keys: config
    """The config for the keys that a file really holds: some tools leave out weights that config.json announces."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Architectures on the Hub that contain this one as a part, to the advice for their files."""
    classifier: str | None = None
    """The name on the Hub of the text classifier that is made of this decoder; None = none is made of it."""
    vllm: VllmLimits | None = None
    """The configurations that vLLM serves; None = vLLM does not serve this architecture."""

    def table(self, config: Any) -> Mapping[str, str | Form]:
        """`names` for a shape."""
        return self.names(config) if callable(self.names) else self.names


def module_maps(module: ModuleType) -> dict[str, HFMap]:
    """The maps of a file by architecture: the one named `HF`, or those that its function `hf_maps` returns."""
    if hasattr(module, "HF"):
        return {module.HF.architecture: module.HF}
    return module.hf_maps() if hasattr(module, "hf_maps") else {}


def hf_map(model: Model) -> HFMap:
    """The map at the end of the architecture file that `model` comes from."""
    found = module_maps(sys.modules[type(model).__module__])
    return found[model.config.architecture] if len(found) > 1 else next(iter(found.values()))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, a shared one once, and every buffer: what a checkpoint holds."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def disk_pieces(model: Model, tied: bool = False) -> dict[str, Piece]:
    """Name on disk to piece, in model order, copies last. With `tied`, also the second names of shared parameters."""
    table = _Table(model)
    weights = [*model.named_parameters(remove_duplicate=not tied), *model.named_buffers()]
    pieces = {
        disk: Piece(name, view)
        for name, tensor in weights
        for disk, view in table.pieces(name, tuple(tensor.shape)).items()
    }
    return pieces | {copy: pieces[key] for copy, key in hf_map(model).copies(model.config).items()}


def fused_pieces(model: Model) -> dict[str, Piece]:
    """Names on disk of whole expert stacks, for files that keep them so."""
    table = _Table(model)
    found = {name: table.form(name) for name, _ in model.named_parameters()}
    return {
        form.fused: Piece(name, _itself) for name, form in found.items() if isinstance(form, Experts) and form.fused
    }


def disk_tensors(model: Model, named: Iterable[tuple[str, Tensor]] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Pairs (name on disk, tensor), a shared parameter once: what `save_model` and a rollout engine take.

    Args:
        model: Whose layout it is.
        named: Pairs (our name, tensor) to take instead of the model's own: gathered shards, master weights, gradients.
    """
    table, wanted = _Table(model), {name for name, _ in named_weights(model)}
    copies: dict[str, list[str]] = {}
    for copy, key in hf_map(model).copies(model.config).items():
        copies.setdefault(key, []).append(copy)
    for name, tensor in named_weights(model) if named is None else named:
        if name not in wanted:  # a second name of a shared parameter
            continue
        # Shapes are those of the tensors given: a parameter of ZeRO-3 has none of its own between forwards.
        for disk, view in table.pieces(name, tuple(tensor.shape)).items():
            for key in (disk, *copies.get(disk, ())):
                yield key, view(tensor.detach())


class _Table:
    """A map's rows, filled in for one model."""

    def __init__(self, model: Model) -> None:
        self._hf = hf_map(model)
        self._names = self._hf.table(model.config)
        self._num_layers = int(getattr(model.config, "num_layers", 0))

    def form(self, name: str) -> Form:
        """The row for one of our weights, its layer number filled in."""
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        whole = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name, count=1)
        row = self._names.get(whole, self._names.get(whole.rpartition(".")[0]))
        assert row is not None, f"{name} is not in the names of {self._hf.architecture}"
        i = int(number[0]) if number else 0
        return _filled(row, {"{i}": str(i), "{n+i}": str(self._num_layers + i)})

    def pieces(self, name: str, shape: tuple[int, ...]) -> dict[str, View]:
        """Name on disk to view for one of our weights."""
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
