"""Count the parameters of the model that a config.json describes, without allocating them."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.layers.moe.moe import SigmoidRouter, SoftmaxRouter
from llmquest_rl.models.architectures import find_architecture
from llmquest_rl.models.checkpoint.skeleton import without_memory
from llmquest_rl.models.checkpoint.weight_files import read_json


class Count(NamedTuple):
    """The number of parameters of a model. A shared parameter counts once; buffers do not count."""

    architecture: str
    total: int
    """All parameters but those of the modules for multi-token prediction, as in transformers."""
    active: int
    """The parameters that one token uses: everything but the experts that it is not routed to."""
    mtp: int
    """The parameters of the modules for multi-token prediction."""


def count_parameters(path: Path) -> Count:
    """Count the parameters of the model that a config.json, or a folder with one, describes.

    Raises:
        ValueError: the file is missing or damaged, the architecture is unknown, or the shape is impossible.
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
    mtp = sum(size for name, size in sizes.items() if _is_mtp(name))
    inactive = sum(_inactive(module) for name, module in model.named_modules() if not _is_mtp(name))
    total = sum(sizes.values()) - mtp
    return Count(hf.architecture, total, total - inactive, mtp)


def _is_mtp(name: str) -> bool:
    return ".mtp." in f".{name}."


def _inactive(module: nn.Module) -> int:
    """Count the parameters of the experts that one token is not routed to."""
    parts = list(module.children())
    chosen = [part.num_chosen for part in parts if isinstance(part, SoftmaxRouter | SigmoidRouter)]
    stacks = [parameter for part in parts if isinstance(part, RoutedExperts) for parameter in part.parameters()]
    return sum(stack[0].numel() * (len(stack) - chosen[0]) for stack in stacks)


def config_files(paths: list[Path]) -> list[Path]:
    """Return the configuration files behind `paths`.

    Args:
        paths: Configuration files, checkpoint folders, or folders of configuration files (`*.json`).

    Raises:
        ValueError: a path does not exist, or is a folder without configuration files.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() and not (path / "config.json").exists() else [path]
        if not path.exists() or not inside:
            raise ValueError(f"{path}: expected a config.json, a checkpoint folder, or a folder of config files")
        found += inside
    return found
