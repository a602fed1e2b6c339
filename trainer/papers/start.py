"""The start model of a recipe: a small model, pretrained by our own trainer and kept for later runs."""

import json
import os
import shutil
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.papers.recipe import Start, StartModel, start_config
from trainer.papers.runs import run_training
from trainer.run.trained import export

END = "<end>"


def start_model(start: Start, folder: Path, origin: str) -> Path:
    """The folder of a start model below `folder`. The model is trained now if it does not exist there."""
    values = start.model_dump_json().encode()
    place = folder / f"start-{blake2b(values, digest_size=6).hexdigest()}"
    if (place / "model").is_dir():
        return place / "model"
    place.mkdir(parents=True, exist_ok=True)
    shape = place / "shape"
    write_shape(start.model, shape)
    run = run_training(start_config(start, shape.resolve(), origin), place, place / "log.txt")
    # Export under another name first, so that a folder `model` is always complete.
    work = Path(mkdtemp(prefix=".model-", dir=place))
    try:
        export(str(run), work)
        os.rename(work, place / "model")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place / "model"


def write_shape(model: StartModel, folder: Path) -> None:
    """Write config.json and a tokenizer whose tokens are characters."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate([END, *dict.fromkeys(model.characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    own = {"vocab_size": len(vocabulary), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**model.config, **own}, indent=2) + "\n", encoding="utf-8")
