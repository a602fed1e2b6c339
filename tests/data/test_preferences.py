"""Preference pairs: the three forms of rows, the tokens that are scored, and the rows that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.conversation import split_at_last_reply, tokenize_row
from llmquest_rl.data.dataset import DatasetContext, SupervisedData
from llmquest_rl.data.datasets import compared_sums, preferences
from llmquest_rl.data.pairs import group_for_scoring, read_ids
from llmquest_rl.data.rows import DataError, MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer

EOS = "<|im_end|>"
ASKED = {"role": "user", "content": "2 + 2?"}
RIGHT, WRONG = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5, I think"}
OTHER = {"prompt": "And 1 + 1?", "chosen": "2", "rejected": "3"}
FORMS = {
    "strings": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5, I think"},
    "replies of messages": {"prompt": "2 + 2?", "chosen": [RIGHT], "rejected": [WRONG]},
    "all messages": {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
    "whole conversations": {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole conversations and their prompt": {"prompt": "2 + 2?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "texts": {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5, I think",
    },
}

Load = Callable[..., SupervisedData]


@pytest.fixture
def load(jsonl: Callable[..., str], context: Callable[..., DatasetContext]) -> Load:
    """Loads rows from a file; the context can be changed."""

    def loaded(rows: list[Any], changes: dict[str, Any] | None = None, **options: Any) -> SupervisedData:
        config = preferences.Config(path=jsonl(rows), **options)
        given = {"tokens_per_sequence": 128, "labels": ("reward",)}
        return preferences.load(config, context(**given | (changes or {})))

    return loaded


def every_group(data: SupervisedData) -> list[SequenceGroup]:
    return [*data.train, *data.validation]


def judged(group: SequenceGroup, renderer: PromptRenderer) -> list[str]:
    """Each reply with all that stands before it, and that the score is read at its end."""
    batch = collate([group])
    assert batch.targets.tolist() == [0, 0] and batch.sequence_ids.tolist() == [0, 1]
    sequences = [group.prompt + completion[:-1] for completion in group.completions]
    assert batch.tokens[batch.sources].tolist() == [ids[-1] for ids in sequences]
    return [renderer.decode(ids) for ids in sequences]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(load: Load, renderer: PromptRenderer, form: str) -> None:
    [group] = [group for group in every_group(load([FORMS[form], OTHER])) if "2 + 2" in judged(group, renderer)[0]]
    asked = renderer.chat_text(renderer.with_system([ASKED]), add_generation_prompt=True)
    assert judged(group, renderer) == [f"{asked}4{EOS}", f"{asked}5, I think{EOS}"]
    assert renderer.decode(group.prompt) == asked, "and is stored once"


def test_what_is_judged_are_the_tokens_that_a_model_is_trained_to_write(renderer: PromptRenderer) -> None:
    row = {"prompt": "2 + 2?", "completion": "4"}
    group = tokenize_row(row, renderer, mask_prompt=True)
    assert split_at_last_reply(row, renderer) == (renderer.prompt_ids("2 + 2?"), group.completions[0])


def test_conversations_part_where_they_first_differ(load: Load, renderer: PromptRenderer) -> None:
    """In HH an earlier reply may differ as well."""
    begun = "\n\nHuman: Hello\n\nAssistant: Hi"
    rows = [
        {
            "chosen": f"{begun}!\n\nHuman: Bye\n\nAssistant: Bye!",
            "rejected": f"{begun}?\n\nHuman: Bye\n\nAssistant: No",
        },
        FORMS["texts"],
    ]
    [group] = [group for group in every_group(load(rows)) if "Hello" in judged(group, renderer)[0]]
    better, worse = judged(group, renderer)
    assert better.endswith(f"user\nBye{EOS}\n<|im_start|>assistant\nBye!{EOS}") and worse.endswith(f"No{EOS}")
    assert renderer.decode(group.prompt).endswith("assistant\nHi")


def test_base_models_are_given_texts_as_they_are(load: Load, tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    rows = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "many"} for n in range(2)]
    groups = every_group(load(rows, {"texts": plain}))
    assert sorted(judged(group, plain)[0] for group in groups) == [f"0+0=0{EOS}", f"1+1=2{EOS}"]
    with pytest.raises(DataError, match="need a chat template"):
        load([FORMS["whole conversations"], OTHER], {"texts": plain})


def test_margins_travel_with_their_pair(load: Load) -> None:
    groups = every_group(load([FORMS["strings"] | {"margin": 0.5}, OTHER | {"margin": 2}]))
    margins = [collate([group]).token_fields["margins"].tolist() for group in groups]
    assert sorted(margins) == [[0.5, 0.5], [2.0, 2.0]]
    assert not every_group(load([FORMS["strings"], OTHER]))[0].token_fields
    renamed = load([FORMS["strings"] | {"gap": 1}, OTHER | {"gap": 1}], columns={"margin": "gap"})
    assert "margins" in renamed.train[0].token_fields


def test_a_table_of_instructions(jsonl: Callable[..., str], context: Callable[..., DatasetContext]) -> None:
    """The form of Alpaca, as a JSON list."""
    rows = [
        {"instruction": f"Spell {n}.", "input": f"in {way}", "output": "?", "rejected": "no", "chosen": f"{n}-{way}"}
        for n, way in ((1, "words"), (2, "letters"))
    ]
    path = Path(jsonl([])).with_name("rows.json")
    path.write_text(json.dumps(rows))
    config = preferences.Config(path=str(path), columns={"prompt": "instruction"}, template="{prompt}\n{input}")  # type: ignore[arg-type]
    made = context(tokens_per_sequence=64, labels=("reward",))
    texts = [judged(group, made.renderer) for group in every_group(preferences.load(config, made))]
    assert any("user\nSpell 1.\nin words<" in better and better.endswith(f"1-words{EOS}") for better, _ in texts)


def test_no_prompt_is_on_both_sides(load: Load, renderer: PromptRenderer) -> None:
    rows = [{"prompt": f"Say {n % 5}", "chosen": str(n), "rejected": "no"} for n in range(50)]
    data = load(rows, validation_share=0.4)
    sides = [{renderer.decode(group.prompt) for group in side} for side in (data.train, data.validation)]
    assert len(sides[0]) == 3 and len(sides[1]) == 2 and not sides[0] & sides[1]


def test_the_longer_reply_decides_whether_a_pair_fits(load: Load) -> None:
    rows = [FORMS["strings"], OTHER, {"prompt": "Go", "chosen": "a", "rejected": "long " * 200}]
    data = load(rows, {"tokens_per_sequence": 50})
    assert data.counters["dropped_long_rows"] == 1
    assert all(group.num_tokens < 100 for group in every_group(data))
    with pytest.raises(DataError, match=r"rows.jsonl:3: the row has \d+ tokens, more than batch.tokens_per_sequence"):
        load(rows, {"tokens_per_sequence": 50, "long_rows": "error"})


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
    "equal in two forms": ({"prompt": "2 + 2?", "chosen": [RIGHT], "rejected": [ASKED, RIGHT]}, "are equal"),
    "no reply": ({"prompt": "a", "chosen": "b"}, "`rejected` must be a string or a list"),
    "no messages": ({"prompt": "a", "chosen": "b", "rejected": []}, "must be a string or a list"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "there is no prompt, so `chosen` must be a whole conversation"),
    "no prompt of replies": ({"chosen": [RIGHT], "rejected": [WRONG]}, "begins with the assistant's message"),
    "unanswered": ({"chosen": [ASKED, RIGHT, ASKED], "rejected": [ASKED, WRONG]}, "must end with the assistant's"),
    "no message": ({"chosen": ["hi"], "rejected": [ASKED, WRONG]}, "a message must be an object"),
    "text that ends with the human": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "turns that alternate",
    ),
    "text that begins elsewhere": (
        {"chosen": "Well.\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "turns that alternate",
    ),
    "empty prompt": ({"prompt": " ", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    "margin of words": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "must be a finite number"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_rows_are_named_or_counted(load: Load, case: str) -> None:
    row, problem = BROKEN[case]
    rows = [FORMS["strings"], OTHER, row]
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{problem}"):
        load(rows)
    dropped = load(rows, {"malformed": MalformedRows("drop")})
    assert dropped.counters["dropped_malformed_rows"] == 1 and len(every_group(dropped)) == 2


def test_a_mapping_that_fits_no_row_is_the_users_mistake(load: Load) -> None:
    for options, named in (
        ({"columns": {"chosen": "better"}}, r"'better' \(columns.chosen\)"),
        ({"columns": {"prompt": "question"}}, r"'question' \(columns.prompt\)"),
        ({"template": "{prompt}{input}"}, r"'input' \(template\)"),
    ):
        with pytest.raises(DataError, match=f"has no column {named}; it has: prompt, chosen, rejected"):
            load([FORMS["strings"], OTHER], {"malformed": MalformedRows("drop")}, **options)
    with pytest.raises(DataError, match="the template needs the missing column 'hint'"):
        load([FORMS["strings"] | {"hint": "x"}, OTHER], template="{prompt}{hint}")


def test_a_group_for_scoring_shares_the_common_beginning() -> None:
    group = group_for_scoring([([], [1, 2, 3]), ([1], [2]), ([1, 2], [4, 5])])
    assert group.prompt == [1, 2] and group.completions == [[3, 0], [0], [4, 5, 0]]
    batch = collate([group])
    assert batch.tokens[batch.sources].tolist() == [3, 2, 5]
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5], "the zeros are not computed"
    alone = collate([group_for_scoring([([7], [8])]), group_for_scoring([([], [1]), ([], [2])])])
    assert alone.tokens[alone.sources].tolist() == [8, 1, 2]
    assert collate([group.unshared()]).tokens.tolist() == [1, 2, 3, 1, 2, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("conversations", "prompt", "read"),
    [
        ([([1, 2], [3, 4]), ([1, 2], [5])], [1, 2], [[3, 4], [5]]),
        ([([1, 2], [3, 4, 6]), ([1, 2], [3, 7])], [1, 2, 3], [[3, 4, 6], [3, 7]]),  # replies that begin alike
        ([([1], [2, 3]), ([1, 2], [3, 4])], [1, 2], [[2, 3], [3, 4]]),  # the conversations differ before the reply
        ([([], [3, 4]), ([], [5])], [], [[3, 4], [5]]),
        ([([1, 2], []), ([1, 2], [5])], [1, 2], [[2], [5]]),  # nothing was replied: the last token of the prompt
    ],
)
def test_the_mean_reads_every_token_of_a_reply(
    conversations: list[tuple[list[int], list[int]]], prompt: list[int], read: list[list[int]]
) -> None:
    group = group_for_scoring(conversations, "mean")
    assert group.prompt == prompt
    for one in (group, group.unshared()):
        batch = collate([one])
        for number, tokens in enumerate(read):
            assert batch.tokens[batch.sources[batch.sequence_ids == number]].tolist() == tokens


def test_the_last_token_is_read_without_the_end_of_sequence_token() -> None:
    assert read_ids(([1], [2, 9]), "last_token", 9) == ([1], [2])
    assert read_ids(([1], [2]), "last_token", 9) == ([1], [2]), "a template may end replies in another way"
    assert read_ids(([1], [2, 9]), "eos", 9) == read_ids(([1], [2, 9]), "mean", 9) == ([1], [2, 9])


@pytest.mark.parametrize("pooling", ["eos", "last_token", "mean"])
def test_pairs_are_read_as_the_objective_asks(load: Load, renderer: PromptRenderer, pooling: str) -> None:
    groups = every_group(load([FORMS["strings"], OTHER], {"pooling": pooling}))
    [group] = [group for group in groups if "2 + 2" in renderer.decode(group.prompt)]
    batch = collate([group])
    texts = [renderer.decode(batch.tokens[batch.sources[batch.sequence_ids == i]].tolist()) for i in (0, 1)]
    assert texts == {"eos": [EOS, EOS], "last_token": ["4", " think"], "mean": [f"4{EOS}", f"5, I think{EOS}"]}[pooling]


def test_right_sums_are_chosen_over_wrong_ones(context: Callable[..., DatasetContext], tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    made = context(tokens_per_sequence=128, texts=plain, labels=("reward",))
    options = {"digits": 2, "rows": 300, "held_out": 20, "direct_share": 0.2, "error_rate": 0.3}
    data = compared_sums.load(compared_sums.Config.model_validate(options), made)
    assert len(data.train) == 300 and len(data.validation) == 20
    problems = []
    for group in every_group(data):
        right, wrong = (text.removesuffix(EOS) for text in judged(group, plain))
        question = right.partition("=")[0]
        assert wrong.startswith(f"{question}=")
        total = sum(map(int, question.split(" + ")))
        assert right.rpartition("#")[2] == str(total) != wrong.rpartition("#")[2]
        problems.append(frozenset(question.split(" + ")))
    assert not set(problems[:300]) & set(problems[300:])
    with pytest.raises(DataError, match="are all alike: choose an error_rate"):
        compared_sums.load(compared_sums.Config.model_validate(options | {"error_rate": 0, "direct_share": 0}), made)
