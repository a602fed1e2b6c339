"""Load a classifier from a folder: a classifier as it is, or a decoder or Vision Transformer with a new head.

Reading is as strict as in `load_save`: every weight of the folder's own architecture must be there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.models.base import ClassifierModel
from llmquest_rl.models.checkpoint.load_save import allocate, load_any_model, read_shape
from llmquest_rl.models.checkpoint.skeleton import without_memory
from llmquest_rl.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from llmquest_rl.models.weight_map import HFMap, hf_map, named_weights
from llmquest_rl.types import Pooling


def load_classifier(
    path: Path | str,
    labels: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    pooling: Pooling | None = None,
) -> ClassifierModel:
    """Load a classifier of `labels` from a checkpoint folder.

    A classifier with the same number of labels is read as it is. From a classifier with another number of labels, and
    from a decoder, everything but the head is taken over, and the head is new.

    Args:
        path: Folder of a decoder, a text classifier or a Vision Transformer.
        labels: The names of the labels, in the order of their indices in data and scores.
        dtype: The dtype of the weights, except of those that stay float32.
        device: The device of the weights.
        seed: Seeds a new head.
        pooling: The tokens at which a reward model will be read; None = it is no reward model.

    Raises:
        ValueError: the folder does not load (see `load_any_model`), its architecture cannot be turned into a
            classifier, or its labels have the same names in another order.
    """
    source = load_any_model(path, dtype, device)
    kind, shape = _classifier_shape(hf_map(source), source.config, tuple(labels), path, pooling)
    if isinstance(source, ClassifierModel) and len(source.config.labels) == len(labels):
        source.config = shape
        return source
    with without_memory():
        model = kind(shape)
    place = "" if isinstance(source, ClassifierModel) else "decoder."
    _take_over(model, {place + name: weight for name, weight in named_weights(source)})
    head = model.get_submodule(model.new_head)
    head.to(dtype).to_empty(device=device)
    model.init_head(torch.Generator().manual_seed(seed))
    return model


def new_classifier(
    path: Path | str,
    labels: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    pooling: Pooling | None = None,
) -> ClassifierModel:
    """Create a classifier of `labels` with random weights, of the shape in `path`/config.json.

    The weights depend on the seed only, not on the device. The arguments are those of `load_classifier`.

    Raises:
        ValueError: config.json is missing or damaged, or its architecture cannot be turned into a classifier.
    """
    kind, shape = _classifier_shape(*read_shape(Path(path)), tuple(labels), path, pooling)
    with without_memory():
        model = kind(shape)
    allocate(model, dtype, device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def check_classifier(path: Path | str, labels: Sequence[str]) -> None:
    """Check that a classifier of `labels` can be made of the model in a folder. Reads config.json only.

    Raises:
        ValueError: see `new_classifier`, and labels that have the same names in another order.
    """
    _classifier_shape(*read_shape(Path(path)), tuple(labels), path)


def _classifier_shape(
    hf: HFMap, shape: Any, labels: tuple[str, ...], path: Path | str, pooling: Pooling | None = None
) -> tuple[type[ClassifierModel], Any]:
    """Return the class and configuration of a classifier of `labels`, made of a model with this map and shape."""
    if issubclass(hf.model, ClassifierModel):
        own = shape.labels
        if own != labels and sorted(own) == sorted(labels):
            raise ValueError(f"{path} has the labels {', '.join(own)} in this order: list them in the same order")
        pooled = {"pooling": pooling} if issubclass(hf.model, SequenceClassifier) else {}
        return hf.model, replace(shape, labels=labels, **pooled)
    if hf.classifier is None:
        raise ValueError(
            f"{path} holds a {hf.architecture}, which cannot be turned into a classifier: use a text decoder, a text "
            "classifier or a Vision Transformer"
        )
    return SequenceClassifier, SequenceClassifierConfig.of_decoder(hf, shape, labels, pooling)


def _take_over(model: ClassifierModel, weights: Mapping[str, Tensor]) -> None:
    """Give an empty model these weights, without copying them. The head stays empty; unused weights are dropped."""
    is_head = f"{model.new_head}."
    wanted = {name for name, _ in named_weights(model) if not name.startswith(is_head)}
    assert wanted <= weights.keys(), "both models have the names of one map"
    state = {name: weights[name] for name in wanted}
    model.load_state_dict(state, strict=False, assign=True)
