"""How many parameters a config.json means, without memory for any of them."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from llmquest_rl.layers.experts import RoutedExperts
from llmquest_rl.layers.moe import SigmoidRouter, SoftmaxRouter
from llmquest_rl.models.hf import find_architecture
from llmquest_rl.models.skeleton import without_memory
from llmquest_rl.models.weight_files import read_json


class Count(NamedTuple):
    """Parameters of a model; a shared one counts once, buffers do not count."""

    architecture: str
    total: int
    """Without the modules for multi-token prediction, as transformers counts."""
    active: int
    """Those that one token passes through: of a mixture, the experts chosen and all the rest."""
    prediction: int
    """Those of the modules for multi-token prediction."""


def count_parameters(path: Path) -> Count:
    """Count what a config.json, or a folder with one, describes.

    Raises:
        ValueError: the file is missing or damaged, names an unknown architecture, or a shape that cannot be.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file)
    hf = find_architecture(values, file)
    try:
        shape = hf.config.from_hf(values)
        with without_memory():
            model = hf.model(shape)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    prediction = sum(size for name, size in sizes.items() if _predicts(name))
    idle = sum(_idle(module) for name, module in model.named_modules() if not _predicts(name))
    total = sum(sizes.values()) - prediction
    return Count(hf.architecture, total, total - idle, prediction)


def _predicts(name: str) -> bool:
    return ".mtp." in f".{name}."


def _idle(module: nn.Module) -> int:
    """Parameters of the experts of a mixture that a token does not go to."""
    parts = list(module.children())
    chosen = [part.num_chosen for part in parts if isinstance(part, SoftmaxRouter | SigmoidRouter)]
    stacks = [parameter for part in parts if isinstance(part, RoutedExperts) for parameter in part.parameters()]
    return sum(stack[0].numel() * (len(stack) - chosen[0]) for stack in stacks)


def config_files(paths: list[Path]) -> list[Path]:
    """The config.json files meant by `paths`: files, checkpoint folders, or folders of such files by other names.

    Raises:
        ValueError: a path is not there, or holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() and not (path / "config.json").exists() else [path]
        if not path.exists() or not inside:
            raise ValueError(f"{path}: expected a config.json, a checkpoint folder, or a folder of config files")
        found += inside
    return found
