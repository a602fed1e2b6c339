"""Models that score, from a folder of any kind: a classifier as it is, or a decoder or ViT with a new head.

Reading is as strict as in `hf.py`: whatever the folder's own architecture asks for must be there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.models.base import Scorer
from llmquest_rl.models.hf import allocate, load_any_model, read_shape
from llmquest_rl.models.names import HFMap, hf_map, named_weights
from llmquest_rl.models.sequence_classifier import DECODERS, SequenceClassifier, SequenceClassifierConfig
from llmquest_rl.models.skeleton import without_memory


def load_scorer(
    path: Path | str, labels: Sequence[str], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Scorer:
    """A model that scores `labels`, from a checkpoint folder.

    A classifier with that many labels is read as it is. With another number, and from a decoder, everything but the
    head is read, and the head is new; a decoder's output layer is read and dropped.

    Args:
        path: Folder of a decoder, a text classifier or a Vision Transformer.
        labels: Names, in the order of the numbers that data and scores have.
        dtype: Of the weights, but those that stay float32.
        device: Where they lie.
        seed: Draws a new head.

    Raises:
        ValueError: as `load_any_model`; nothing that scores is made of this architecture; the folder's labels are the
            same names in another order.
    """
    source = load_any_model(path, dtype, device)
    kind, shape = _scorer_shape(hf_map(source), source.config, tuple(labels), path)
    if isinstance(source, Scorer) and len(source.config.labels) == len(labels):
        source.config = shape
        return source
    with without_memory():
        model = kind(shape)
    place = "" if isinstance(source, Scorer) else "decoder."
    _take_over(model, {place + name: weight for name, weight in named_weights(source)})
    head = model.get_submodule(model.new_head)
    head.to(dtype).to_empty(device=device)
    model.init_head(torch.Generator().manual_seed(seed))
    return model


def new_scorer(
    path: Path | str, labels: Sequence[str], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Scorer:
    """As `load_scorer`, of the shape in `path`/config.json with random weights: the same for a seed on every device.

    Raises:
        ValueError: config.json is missing or damaged, or nothing that scores is made of its architecture.
    """
    kind, shape = _scorer_shape(*read_shape(Path(path)), tuple(labels), path)
    with without_memory():
        model = kind(shape)
    allocate(model, dtype, device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def check_scorer(path: Path | str, labels: Sequence[str]) -> None:
    """Check that `load_scorer` and `new_scorer` can make something of a folder's config.json. No weight is read.

    Raises:
        ValueError: as they.
    """
    _scorer_shape(*read_shape(Path(path)), tuple(labels), path)


def _scorer_shape(hf: HFMap, shape: Any, labels: tuple[str, ...], path: Path | str) -> tuple[type[Scorer], Any]:
    """The class and config of what scores `labels` and is made of a model with map `hf` and config `shape`."""
    if issubclass(hf.model, Scorer):
        own = shape.labels
        if own != labels and sorted(own) == sorted(labels):
            raise ValueError(f"{path} has the labels {', '.join(own)} in this order: name them in the same")
        return hf.model, replace(shape, labels=labels)
    if hf not in DECODERS.values():
        raise ValueError(
            f"{path} holds a {hf.architecture}, of which nothing that scores is made: give a decoder of text, a text "
            "classifier or a Vision Transformer"
        )
    return SequenceClassifier, SequenceClassifierConfig.of_decoder(hf, shape, labels)


def _take_over(model: Scorer, weights: Mapping[str, Tensor]) -> None:
    """Give a skeleton these weights, without a copy; what it does not have is dropped, its head stays without."""
    is_head = f"{model.new_head}."
    wanted = {name for name, _ in named_weights(model) if not name.startswith(is_head)}
    assert wanted <= weights.keys(), "one map gave the names of both"
    state = {name: weights[name] for name in wanted}
    model.load_state_dict(state, strict=False, assign=True)
