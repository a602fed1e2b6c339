"""Supervised data sets: the loss falls on the replies and on nothing else."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmquest_rl.batch import collate
from llmquest_rl.data.conversation import tokenize_row
from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import preferences, sft, text
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import DataError, MalformedRows
from llmquest_rl.data.tasks import table
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer
from llmquest_rl.options import Options

EOS = "<|im_end|>"
DIALOGUE = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "\n\nHi! "},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "never answered"},
]
STRIPS_EARLIER_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}...{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt(group: Any, renderer: PromptRenderer) -> str:
    return renderer.decode(collate([group]).targets.tolist())


def test_the_loss_of_a_dialogue_falls_on_exactly_the_replies(renderer: PromptRenderer) -> None:
    group = tokenize_row({"messages": DIALOGUE}, renderer, mask_prompt=True)
    assert learnt(group, renderer) == f"\n\nHi! {EOS}4{EOS}"
    whole = renderer.decode([*group.prompt, *group.completions[0]])
    assert whole + "\n" == renderer.chat_text(renderer.with_system(DIALOGUE[:4]), add_generation_prompt=False)


def test_without_a_mask_everything_but_the_first_token_is_learnt(renderer: PromptRenderer) -> None:
    group = tokenize_row({"messages": DIALOGUE[:2]}, renderer, mask_prompt=False)
    whole = renderer.chat_text(renderer.with_system(DIALOGUE[:2]), add_generation_prompt=False)
    assert "<|im_start|>" + learnt(group, renderer) == whole


@pytest.mark.parametrize("prompt", ["2 + 2?", [{"role": "user", "content": "2 + 2?"}]])
def test_a_prompt_is_trained_on_as_it_is_generated_from(renderer: PromptRenderer, prompt: Any) -> None:
    group = tokenize_row({"prompt": prompt, "completion": "4"}, renderer, mask_prompt=True)
    assert group.prompt == renderer.prompt_ids(prompt)
    assert learnt(group, renderer) == f"4{EOS}"


def test_plain_text_rows_end_with_the_end_token(tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    group = tokenize_row({"prompt": "2 + 2 =", "completion": " 4"}, plain, mask_prompt=True)
    assert plain.decode(group.prompt) == "2 + 2 =" and learnt(group, plain) == f" 4{EOS}"
    with pytest.raises(DataError, match="messages need a chat template"):
        tokenize_row({"messages": DIALOGUE}, plain, mask_prompt=True)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    strips = prompt_renderer(tokenizer, chat_template=STRIPS_EARLIER_TURNS)
    assert learnt(tokenize_row({"messages": DIALOGUE[:2]}, strips, mask_prompt=True), strips) == f"\n\nHi! {EOS}"
    with pytest.raises(DataError, match="renders the conversation up to message 3 differently"):
        tokenize_row({"messages": DIALOGUE}, strips, mask_prompt=True)


ROWS: list[Any] = [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(40)]


def test_sft_splits_by_question_and_counts_what_it_drops(
    jsonl: Callable[..., str], context: Callable[..., DatasetContext], renderer: PromptRenderer
) -> None:
    bad = [
        {"prompt": "no completion"},
        {"messages": []},
        {"messages": DIALOGUE[:1]},
        {"messages": [{"role": "user"}]},
        "no json",
    ]
    path = jsonl([*ROWS, *bad, {"prompt": "long " * 80, "completion": "yes"}])
    malformed = MalformedRows("drop")
    data = sft.load(sft.Config(path=path, validation_share=0.1), context(malformed=malformed))
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert data.counters == {"dropped_malformed_rows": 5, "dropped_long_rows": 1, "dropped_overlapping_rows": 0}
    assert f"{path}:41: " in malformed.reports[0] and "completion" in malformed.reports[0]
    prompts = [{renderer.decode(group.prompt) for group in side} for side in (data.train, data.validation)]
    assert not prompts[0] & prompts[1]


def test_sft_fills_a_template_as_pairs_and_tasks_do(
    context: Callable[..., DatasetContext], renderer: PromptRenderer, jsonl: Callable[..., str]
) -> None:
    """So the stages of RLHF read one file of pairs with the same prompts, and hold out the same ones."""
    rows = [{"instruction": f"Add {i}", "input": f"to {i}", "chosen": f"{2 * i}", "rejected": "no"} for i in range(20)]
    path, template = jsonl(rows), "{prompt}\n{input}"
    columns = {"prompt": "instruction", "completion": "chosen"}
    tuned = sft.load(sft.Config.model_validate({"path": path, "columns": columns, "template": template}), context())
    pair_columns = {"prompt": "instruction"}
    pairs = preferences.load(
        preferences.Config.model_validate({"path": path, "columns": pair_columns, "template": template}),
        context(labels=("reward",)),
    )
    task_columns = {"prompt": "instruction", "answer": None}
    asked = table.load(
        table.Config.model_validate(
            {"path": path, "columns": task_columns, "template": template, "held_out_share": 0.05}
        ),
        0,
        MalformedRows("error"),
    )
    [group], [pair] = tuned.validation, pairs.validation
    [problem] = [asked.held_out.row(i) for i in range(asked.held_out.size or 0)]
    assert "\nto " in problem.prompt
    assert group.prompt == renderer.prompt_ids(problem.prompt)
    assert pair.prompt[: len(group.prompt)] == group.prompt
    with pytest.raises(DataError, match=r"has no column 'hint' \(template\)"):
        sft.load(sft.Config.model_validate({"path": path, "columns": columns, "template": "{hint}"}), context())


def test_sft_stops_at_a_malformed_or_long_row_where_that_is_asked_for(
    jsonl: Callable[..., str], context: Callable[..., DatasetContext]
) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:41: .*neither `messages` nor `prompt`.*it has: prompt"):
        sft.load(sft.Config(path=jsonl([*ROWS, {"prompt": "x"}])), context())
    long = {"prompt": "long " * 80, "completion": "yes"}
    with pytest.raises(DataError, match=r"rows.jsonl:41: the row has \d+ tokens, more than batch.tokens_per_sequence"):
        sft.load(sft.Config(path=jsonl([*ROWS, long])), context(long_rows="error"))


def test_sft_leaves_validation_questions_of_another_file_out_of_training(
    jsonl: Callable[..., str], context: Callable[..., DatasetContext]
) -> None:
    columns = sft.Columns(prompt="q", completion="a")
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    config = sft.Config(path=jsonl(rows), validation_path=jsonl(rows[:3], "val.jsonl"), columns=columns)
    data = sft.load(config, context())
    assert (len(data.train), len(data.validation), data.counters["dropped_overlapping_rows"]) == (37, 3, 3)


def test_sft_learns_the_gold_answers_of_a_task(
    context: Callable[..., DatasetContext], renderer: PromptRenderer
) -> None:
    config = sft.Config(task={"name": "arithmetic", "digits": 1, "template": "{question}"}, task_rows=50)
    data = sft.load(config, context())
    prompts = [{renderer.decode(group.prompt) for group in side} for side in (data.train, data.validation)]
    assert len(data.train) == 50 and not prompts[0] & prompts[1]
    for group in data.train:
        left, right = renderer.decode(group.prompt).split("user\n")[1].split(EOS)[0].split(" + ")
        assert learnt(group, renderer) == f"{int(left) + int(right)}{EOS}"
    for task, message in (
        ({"digits": 1}, "a task needs a `name`"),
        ({"name": "arithmetics"}, "not the name of a task"),
    ):
        with pytest.raises(ValueError, match=message):
            sft.Config(task=task)


def test_a_user_function_gives_rows(context: Callable[..., DatasetContext], renderer: PromptRenderer) -> None:
    data = open_dataset("mine.py:rows", lambda: iter(ROWS), Options(), context())
    assert (len(data.train), len(data.validation), data.name) == (38, 2, "rows")


def test_sft_learns_the_answers_of_a_users_task(
    context: Callable[..., DatasetContext],
    renderer: PromptRenderer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "squares.py").write_text(
        "def squares(largest: int, seed: int):\n"
        "    for n in range(largest):\n"
        "        yield {'prompt': f'{n} squared', 'answer': str(n * n + seed)}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = sft.Config(task={"name": "squares.py:squares", "largest": 20})
    assert config.task == {"name": f"{tmp_path}/squares.py:squares", "largest": 20}
    data = sft.load(config, context(seed=1))
    assert (len(data.train), len(data.validation)) == (18, 2)
    answers = {learnt(group, renderer) for side in (data.train, data.validation) for group in side}
    assert answers == {f"{n * n + 1}{EOS}" for n in range(20)}
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="broken.py, line 1, `1 / 0`: ZeroDivisionError"):
        sft.Config(task={"name": "broken.py:squares"})


def test_a_user_function_gives_pairs_or_labels(context: Callable[..., DatasetContext]) -> None:
    pairs: list[dict[str, Any]] = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = open_dataset("mine.py:pairs", lambda: pairs, Options(), context(labels=("reward",)))
    assert {len(group.completions) for group in [*data.train, *data.validation]} == {2}
    labels: list[dict[str, Any]] = [{"text": f"message {i}", "label": "spam"} for i in range(4)]
    data = open_dataset("mine.py:labels", lambda: labels, Options(), context(labels=("ham", "spam")))
    assert {group.completions[0][-1] for group in [*data.train, *data.validation]} == {1}
    with pytest.raises(DataError, match="the objective has no labels"):
        open_dataset("mine.py:labels", lambda: labels, Options(), context())


def test_text_is_joined_by_the_end_token_and_cut_into_blocks(
    tmp_path: Path, context: Callable[..., DatasetContext], renderer: PromptRenderer
) -> None:
    documents = [f"Document {i} says {i * i}. " * (i + 1) for i in range(10)]
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(document)
    (tmp_path / "empty.txt").write_text(" \n")
    data = text.load(text.Config(path=str(tmp_path / "*.txt"), validation_share=0.2), context(tokens_per_sequence=16))
    sides = [[token for group in side for token in group.completions[0]] for side in (data.train, data.validation)]
    found = [renderer.decode(side).split(EOS) for side in sides]
    assert [len(side) for side in found] == [9, 3] and all(side[-1] == "" for side in found)
    assert sorted(found[0][:-1] + found[1][:-1]) == sorted(documents)
    assert all(len(group.completions[0]) == 16 and group.prompt == [] for group in data.train[:-1])
    assert data.train[-1] == data.train[len(data.train) - 1] != data.train[0]
    assert learnt(data.train[0], renderer) == renderer.decode(sides[0][1:16])


def test_text_reads_rows_and_counts_malformed_ones(
    jsonl: Callable[..., str], context: Callable[..., DatasetContext]
) -> None:
    rows = [{"body": "some words of text"}, {"body": None}, {"body": "other words"}, "{"]
    malformed = MalformedRows("drop")
    data = text.load(text.Config(path=jsonl(rows), text_column="body"), context(malformed=malformed))
    assert data.counters["dropped_malformed_rows"] == 2 and len(data.train) == len(data.validation) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:2: there is no text in the column 'body'"):
        text.load(text.Config(path=jsonl(rows), text_column="body"), context())


def test_text_from_pythons_own_library_needs_no_files(context: Callable[..., DatasetContext]) -> None:
    data = text.load(text.Config(path="{stdlib}/json/*.py"), context())
    assert len(data.train) > 50 and len(data.validation) > 0
    assert list(Path(sysconfig.get_path("stdlib")).glob("json/*.py"))


def test_text_says_what_is_missing(tmp_path: Path, context: Callable[..., DatasetContext]) -> None:
    with pytest.raises(DataError, match="there is no file"):
        text.load(text.Config(path=str(tmp_path / "*.md")), context())
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(DataError, match="1 documents"):
        text.load(text.Config(path=str(tmp_path / "one.txt")), context())
    (tmp_path / "two.txt").write_bytes(b"\xff\xfe not UTF-8")
    with pytest.raises(DataError, match="two.txt: not UTF-8"):
        text.load(text.Config(path=str(tmp_path / "*.txt")), context())
