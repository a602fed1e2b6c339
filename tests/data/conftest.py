"""The tokenizer of the packaged model, and a renderer with its chat template."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, load_tokenizer, prompt_renderer
from llmquest_rl.models.checkpoint.hub import resolve_model


@pytest.fixture(scope="session")
def model_path() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path)


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> PromptRenderer:
    return prompt_renderer(tokenizer, system_prompt="Be brief.")


@pytest.fixture
def context(renderer: PromptRenderer) -> Callable[..., DatasetContext]:
    def make(**changes: Any) -> DatasetContext:
        given = {"texts": renderer, "tokens_per_sequence": 64, "seed": 0, "malformed": MalformedRows("error")}
        return DatasetContext(**(given | changes))

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (dicts, or raw lines) and returns the path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
