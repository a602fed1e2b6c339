"""Rendering prompts: templates and plain text."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from llmquest_rl.data.rows import DataError
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, load_tokenizer, prompt_renderer
from llmquest_rl.data.tokenizer_files import GENERAL, OVERRULED, names_general_class, read_decoder, read_tokenizer

TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "2 + 2?"},
]


def test_prompts_are_rendered_as_transformers_renders_them(tokenizer: Tokenizer, renderer: PromptRenderer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt_ids(TURNS) == expected
    assert renderer.prompt_ids(messages) == expected, "a conversation keeps its own system message"
    assert renderer.prompt_ids("2 + 2?") == renderer.prompt_ids([TURNS[2]])


def test_a_template_may_be_text_or_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        renderer = prompt_renderer(tokenizer, chat_template=given)
        assert renderer.decode(renderer.prompt_ids("a")) == "[a]"
    with pytest.raises(DataError, match="neither a file nor"):
        prompt_renderer(tokenizer, chat_template=str(tmp_path / "none.jinja"))


def test_a_template_that_refuses_the_messages_says_so(tokenizer: Tokenizer) -> None:
    renderer = prompt_renderer(tokenizer, "Be brief.", "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="roles system, user: no system role"):
        renderer.prompt_ids("a")


def test_a_tokenizer_without_a_template_needs_a_decision(model_path: Path) -> None:
    bare = load_tokenizer(model_path)
    bare.chat_template = None
    with pytest.raises(DataError, match="set data.chat_template"):
        prompt_renderer(bare)
    plain = prompt_renderer(bare, chat_template="none")
    assert plain.decode(plain.prompt_ids("2 + 2 =")) == "2 + 2 ="
    with pytest.raises(DataError, match="messages need a chat template"):
        plain.prompt_ids(TURNS)
    with pytest.raises(DataError, match="system_prompt needs a chat template"):
        prompt_renderer(bare, system_prompt="Be brief.", chat_template="none")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "qwen3", "gemma3_text", "deepseek_v3", "mixtral"])
def test_a_folder_is_read_as_auto_tokenizer_reads_it(
    model_path: Path, tmp_path: Path, model_type: str, named: str | None
) -> None:
    shutil.copy(model_path / "tokenizer.json", tmp_path)
    settings = json.loads((model_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = read_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours) is type(theirs) and ours.special_tokens_map == theirs.special_tokens_map
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_the_list_of_overruled_models_is_that_of_transformers() -> None:
    general = (*GENERAL, "PythonBackend", None)
    corrected = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    registered = tokenization_auto.TOKENIZER_MAPPING_NAMES
    mistral = {model for model, name in registered.items() if name == "MistralCommonBackend"}
    assert mistral | {model for model in corrected if registered.get(model) not in general} == OVERRULED


def test_the_model_of_the_quickstart_needs_no_auto_tokenizer(model_path: Path) -> None:
    assert names_general_class(model_path)


def random_sequences(size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(size) for _ in range(12)] for _ in range(300)] + [list(range(min(64, size)))]


CHANGES = {
    "as it is": {},
    "another token is special": {"additional_special_tokens": ["<|odd|>", "the"]},
    "an end that tokenizer.json does not call special": {"eos_token": "the"},
    "an added token that is not special there": {
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": False}}
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_completions_are_decoded_as_transformers_decodes_them(change: str, model_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CHANGES[change]))
    expected, decoder = AutoTokenizer.from_pretrained(folder), read_decoder(folder)
    sequences = random_sequences(len(expected))
    texts = expected.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoder.texts(sequences) == texts
    assert decoder.eos == expected.eos_token_id


def test_what_is_all_in_one_file_is_decoded_without_transformers(model_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from llmquest_rl.data.tokenizer_files import read_decoder; "
        f"print(read_decoder(Path({str(model_path)!r})).texts([[1, 2]]), 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[-1] == "False"
