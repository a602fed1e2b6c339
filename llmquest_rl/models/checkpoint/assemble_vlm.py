"""A new vision-language model from the folders of its parts. See `vlm.py`."""

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
"""The companions that say how images are normalised."""


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
    """Write a checkpoint folder whose tower and decoder are those of two other folders, with a new adapter.

    Args:
        vision: A Vision Transformer's folder; without weights the tower is random. Its classifier is left out; its
            `preprocessor_config.json` is copied.
        language: A decoder's folder, the same; its tokenizer files and special token ids are copied.
        target: Folder to write into; made if needed.
        image_token_id: See `VLMConfig`, as `adapter` and `frozen`.
        dtype: Of the weights that are written.
        seed: Draws the adapter, and parts without weights.
        tokenizer: Folder whose tokenizer files are copied in place of the decoder's.

    Raises:
        ValueError: a folder does not load or holds another kind of model; a choice is not sound.
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
