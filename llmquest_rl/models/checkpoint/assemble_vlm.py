"""Assemble a new vision-language model (`vlm.py`) from the folders of its parts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from llmquest_rl.models.base import CausalLM, Model
from llmquest_rl.models.checkpoint.load_save import COMPANIONS, load_any_model, new_any_model, save_model
from llmquest_rl.models.checkpoint.weight_files import has_weights, read_json
from llmquest_rl.models.vit import ViT
from llmquest_rl.models.vlm import VLM, VLMConfig
from llmquest_rl.models.weight_map import disk_tensors

VISION_COMPANIONS = {"preprocessor_config.json"}
"""The companion files that describe how images are normalised."""


def assemble(
    vision: Path,
    language: Path,
    target: Path,
    image_token_id: int,
    adapter: str = "mlp",
    frozen: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> None:
    """Write the checkpoint folder of a vision-language model: two parts from other folders, and a new adapter.

    Args:
        vision: Folder of a Vision Transformer; the tower is random if the folder has no weights. The classifier is left
            out; `preprocessor_config.json` is copied.
        language: Folder of a decoder; it is random if the folder has no weights. The tokenizer files and the special
            token ids are copied.
        target: Folder to write into; it is created if needed.
        image_token_id: See `VLMConfig`.
        adapter: See `VLMConfig`.
        frozen: See `VLMConfig`.
        dtype: The dtype of the weights in the new folder.
        seed: Seeds the random weights of the adapter and of parts without weights.
        tokenizer: Folder whose tokenizer files are copied instead of the decoder's.

    Raises:
        ValueError: a folder does not load or holds another kind of model, or `VLMConfig` refuses a value.
    """
    tower, decoder = _part(vision, dtype, seed), _part(language, dtype, seed + 1)
    if not isinstance(tower, ViT):
        raise ValueError(f"{vision} holds a {type(tower).__name__}: expected a Vision Transformer")
    if not isinstance(decoder, CausalLM) or isinstance(decoder, VLM):
        raise ValueError(f"{language} holds a {type(decoder).__name__}: expected a language model")
    config = VLMConfig(replace(tower.config, labels=()), decoder.config, adapter, image_token_id, tuple(frozen))
    model = VLM(config).to(dtype)
    model.init_weights(torch.Generator().manual_seed(seed + 2))
    seen = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("classifier.")}
    model.vision.load_state_dict(seen)
    model.decoder.load_state_dict(decoder.state_dict())
    target.mkdir(parents=True, exist_ok=True)
    for folder, patterns in ((tokenizer or language, set(COMPANIONS) - VISION_COMPANIONS), (vision, VISION_COMPANIONS)):
        for file in folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copyfile(file, target / file.name)
    special = {key: id_ for key, id_ in read_json(language / "config.json").items() if key.endswith("_token_id")}
    content = json.dumps({**config.to_hf(), **special, "image_token_id": image_token_id}, indent=2)
    (target / "config.json").write_text(content + "\n", encoding="utf-8")
    save_model(target, disk_tensors(model), target)


def _part(folder: Path, dtype: torch.dtype, seed: int) -> Model:
    return load_any_model(folder, dtype) if has_weights(folder) else new_any_model(folder, dtype, seed=seed)
