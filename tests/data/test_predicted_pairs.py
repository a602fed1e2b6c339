"""Pairs for objectives that predict tokens: the targets are the tokens of the last replies and no others."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.data.conversation import split_at_last_reply, tokenize_row
from llmquest_rl.data.dataset import DatasetContext, SupervisedData
from llmquest_rl.data.datasets import compared_sums, preferences
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import DataError, MalformedRowError, MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer
from llmquest_rl.options import Options
from tests.data.test_preferences import ASKED, EOS, FORMS, OTHER, RIGHT, WRONG, every_group

Load = Callable[..., SupervisedData]
USES: dict[str, tuple[str, ...]] = {"scored": ("reward",), "predicted": ()}
TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that leaves out reasoning, and white space around a message."""


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def load(jsonl: Callable[..., str], context: Callable[..., DatasetContext]) -> Load:
    """Loads rows from a file; the context can be changed."""

    def loaded(rows: list[Any], **changes: Any) -> SupervisedData:
        made = context(**{"tokens_per_sequence": 128} | changes)
        return preferences.load(preferences.Config(path=jsonl(rows)), made)

    return loaded


def targets(group: SequenceGroup) -> list[list[int]]:
    """The targets of each completion, as a model is given them."""
    batch = collate([group])
    found: list[list[int]] = [[] for _ in group.completions]
    for number, target in zip(batch.sequence_ids.tolist(), batch.targets.tolist(), strict=True):
        found[number].append(target)
    return found


def learnt(group: SequenceGroup, renderer: PromptRenderer) -> list[str]:
    return list(map(renderer.decode, targets(group)))


def group_of(data: SupervisedData, text: str, renderer: PromptRenderer) -> SequenceGroup:
    """The only group whose prompt has the text."""
    [group] = [group for group in every_group(data) if text in renderer.decode(group.prompt)]
    return group


@pytest.mark.parametrize("form", FORMS)
def test_the_targets_of_every_form_are_the_replies(load: Load, renderer: PromptRenderer, form: str) -> None:
    group = group_of(load([FORMS[form], OTHER]), "2 + 2", renderer)
    assert group.prompt == renderer.prompt_ids("2 + 2?") and group.mask is None
    assert [renderer.decode(ids) for ids in group.completions] == [f"4{EOS}", f"5, I think{EOS}"]
    assert learnt(group, renderer) == [f"4{EOS}", f"5, I think{EOS}"]


def test_replies_to_texts_without_a_template(load: Load, tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    rows = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "many"} for n in range(2)]
    group = group_of(load(rows, texts=plain), "1+1=", plain)
    assert plain.decode(group.prompt) == "1+1=" and group.mask is None
    assert learnt(group, plain) == [f"2{EOS}", f"many{EOS}"]
    for form in ("whole conversations", "texts", "all messages"):
        with pytest.raises(DataError, match=r"rows.jsonl:1: messages need a chat template"):
            load([FORMS[form], OTHER], texts=plain)


def test_replies_that_begin_alike_do_not_make_the_prompt_longer(load: Load, renderer: PromptRenderer) -> None:
    rows = [{"prompt": "Count.", "chosen": "one two three", "rejected": "one two"}, OTHER]
    group = group_of(load(rows), "Count.", renderer)
    assert group.prompt == renderer.prompt_ids("Count.")
    assert learnt(group, renderer) == [f"one two three{EOS}", f"one two{EOS}"]


DIVERGING = {
    "at an earlier reply": ([ASKED, RIGHT, ASKED, RIGHT], [ASKED, WRONG, ASKED, WRONG]),
    "at a turn of the user": ([ASKED, RIGHT, said("user", "Yes"), WRONG], [ASKED, RIGHT, said("user", "No"), RIGHT]),
    "in the number of turns": ([ASKED, RIGHT, said("user", "Yes"), RIGHT], [ASKED, WRONG]),
    "at the last reply": ([ASKED, RIGHT, said("user", "Yes"), RIGHT], [ASKED, RIGHT, said("user", "Yes"), WRONG]),
}


@pytest.mark.parametrize("case", DIVERGING)
def test_only_the_last_replies_of_conversations_are_targets(load: Load, renderer: PromptRenderer, case: str) -> None:
    chosen, rejected = DIVERGING[case]
    group = group_of(load([{"chosen": chosen, "rejected": rejected}, OTHER]), "2 + 2?", renderer)
    assert learnt(group, renderer) == [f"{talk[-1]['content']}{EOS}" for talk in (chosen, rejected)]
    whole = [renderer.decode(group.prompt + completion) + "\n" for completion in group.completions]
    given = [renderer.chat_text(renderer.with_system(talk), False) for talk in (chosen, rejected)]  # type: ignore[arg-type]
    assert whole == given
    assert (group.mask is None) == (case == "at the last reply")
    assert len({completion[0] for completion in group.completions}) == 2, "what is common is stored once"


def test_the_targets_are_those_of_fine_tuning(load: Load, renderer: PromptRenderer) -> None:
    """Fine-tuning learns the earlier replies, too, and before the last one."""
    talks = {"chosen": [ASKED, WRONG, ASKED, RIGHT], "rejected": [ASKED, RIGHT, ASKED, WRONG]}
    group = group_of(load([talks, OTHER]), "2 + 2?", renderer)
    for found, talk in zip(targets(group), talks.values(), strict=True):
        [fine_tuned] = targets(tokenize_row({"messages": talk}, renderer, mask_prompt=True))
        [earlier] = targets(tokenize_row({"messages": talk[:2]}, renderer, mask_prompt=True))
        assert fine_tuned == earlier + found
    group = group_of(load([FORMS["strings"], OTHER]), "2 + 2", renderer)
    for found, reply in zip(targets(group), ("chosen", "rejected"), strict=True):
        row = {"prompt": "2 + 2?", "completion": FORMS["strings"][reply]}
        assert [found] == targets(tokenize_row(row, renderer, mask_prompt=True))


REPLY = st.text(max_size=20).filter(str.strip)


@st.composite
def rows_of_pairs(draw: st.DrawFn) -> dict[str, Any]:
    """A prompt and two replies, or two conversations that part somewhere."""
    chosen, rejected = draw(REPLY), draw(REPLY)
    if draw(st.booleans()):
        return {"prompt": draw(REPLY), "chosen": chosen, "rejected": rejected}
    common = [said("user", draw(REPLY)), said("assistant", draw(REPLY))]
    asked = draw(st.lists(REPLY, min_size=2, max_size=2))
    first, second = (
        [*common[: draw(st.sampled_from((0, 2)))], said("user", text), said("assistant", reply)]
        for text, reply in zip(asked, (chosen, rejected), strict=True)
    )
    return {"chosen": first, "rejected": second}


@settings(deadline=None, max_examples=200)
@given(row=rows_of_pairs())
@pytest.mark.parametrize("template", [None, "none"])
def test_prompt_and_completion_are_the_tokens_of_the_conversation(
    tokenizer: Tokenizer, template: str | None, row: dict[str, Any]
) -> None:
    assume(template is None or "prompt" in row)
    renderer = prompt_renderer(tokenizer, chat_template=template)
    kind = preferences.pairs(DatasetContext(renderer, 1000, 0, MalformedRows("error")))
    assume(kind.check(row) is None)
    try:
        group = kind.group(row)
    except MalformedRowError:
        assume(False)
    for completion, learnt, reply in zip(group.completions, targets(group), preferences.REPLIES, strict=True):
        one = preferences.conversation(row, reply)
        before, said = split_at_last_reply(one, renderer)
        assert group.prompt + completion == before + said
        fine_tuned = tokenize_row(one, renderer, mask_prompt=True)
        assert group.prompt + completion == fine_tuned.prompt + fine_tuned.completions[0]
        assert completion[-len(learnt) :] == learnt == targets(fine_tuned)[0][-len(learnt) :]
        if "prompt" in row:
            assert learnt == completion == fine_tuned.completions[0] and group.prompt == fine_tuned.prompt


def test_margins_have_a_value_for_every_token(load: Load, renderer: PromptRenderer) -> None:
    data = load([FORMS["strings"] | {"margin": 0.5}, OTHER | {"margin": 2}])
    group = group_of(data, "2 + 2", renderer)
    assert group.token_fields["margins"] == [[0.5] * len(ids) for ids in group.completions]
    assert not every_group(load([FORMS["strings"], OTHER]))[0].token_fields


BLANK = {
    "an empty string": FORMS["strings"] | {"rejected": ""},
    "white space": FORMS["strings"] | {"rejected": " \n"},
    "an empty reply of messages": FORMS["replies of messages"] | {"rejected": [said("assistant", "")]},
    "a conversation of an empty reply": {
        "chosen": [ASKED, RIGHT],
        "rejected": [ASKED, said("assistant", " ")],
    },
    "a text that ends with a name": {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant:",
    },
}


def assert_third_is_malformed(load: Load, row: dict[str, Any], problem: str, **changes: Any) -> None:
    rows = [FORMS["strings"], OTHER, row]
    with pytest.raises(DataError, match=rf"rows.jsonl:3: {problem}.*malformed_rows: drop"):
        load(rows, **changes)
    dropped = load(rows, malformed=MalformedRows("drop"), **changes)
    assert dropped.counters["dropped_malformed_rows"] == 1 and len(every_group(dropped)) == 2


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", BLANK)
def test_empty_replies_are_malformed(load: Load, case: str, use: str) -> None:
    assert_third_is_malformed(load, BLANK[case], "the last reply of `rejected` is empty", labels=USES[use])


@pytest.mark.parametrize("use", USES)
def test_replies_without_tokens_of_their_own_are_malformed(load: Load, tokenizer: Tokenizer, use: str) -> None:
    changes = {"texts": prompt_renderer(tokenizer, chat_template=TRIMS), "labels": USES[use]}
    reasons = {"prompt": "And 3 + 3?", "chosen": "<think>So 6.</think>", "rejected": "7"}
    assert_third_is_malformed(load, reasons, r"the tokens of a reply have no text: '<\|im_end\|>'", **changes)
    spaces = {"prompt": "And 3 + 3?", "chosen": "6", "rejected": " 6 "}
    assert_third_is_malformed(load, spaces, "the tokens of the chosen and the rejected reply are equal", **changes)
    two_forms = {"prompt": "And 3 + 3?", "chosen": "6", "rejected": [said("assistant", "6")]}
    assert_third_is_malformed(load, two_forms, "the tokens of the chosen and the rejected reply are equal", **changes)


LOST = "\x16"
"""A character for which the vocabulary of SmolLM2 has no token."""


def test_characters_without_a_token_do_not_make_a_text(load: Load, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(LOST) == []
    changes = {"texts": prompt_renderer(tokenizer, chat_template="none")}
    for row, problem in (
        ({"prompt": LOST, "chosen": "6", "rejected": "7"}, "the prompt has no tokens"),
        ({"prompt": "3 + 3?", "chosen": "6", "rejected": LOST}, "the tokens of a reply have no text"),
        ({"prompt": "3 + 3?", "chosen": "6", "rejected": f"6{LOST}"}, "the tokens of the chosen and .* are equal"),
    ):
        assert_third_is_malformed(load, row, problem, **changes)


def test_replies_that_do_not_fit_are_dropped_or_named(load: Load) -> None:
    rows = [FORMS["strings"], OTHER, {"prompt": "Go", "chosen": "a", "rejected": "long " * 200}]
    data = load(rows)
    assert data.counters["dropped_long_rows"] == 1 and len(every_group(data)) == 2
    with pytest.raises(DataError, match=r"rows.jsonl:3: the row has \d+ tokens, more than batch.tokens_per_sequence"):
        load(rows, long_rows="error")


def test_a_users_pairs_are_predicted_as_well(context: Callable[..., DatasetContext], renderer: PromptRenderer) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = open_dataset("mine.py:pairs", lambda: rows, Options(), context())
    assert [learnt(group, renderer) for group in every_group(data)] == [[f"yes{EOS}", f"no{EOS}"]] * 4


def test_right_and_wrong_sums_are_predicted(context: Callable[..., DatasetContext], tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none")
    config = compared_sums.Config(digits=2, rows=50, held_out=10)
    groups = every_group(compared_sums.load(config, context(tokens_per_sequence=128, texts=plain)))
    assert len(groups) == 60
    for group in groups:
        total = sum(map(int, plain.decode(group.prompt).removesuffix("=").split(" + ")))
        right, wrong = (text.removesuffix(EOS).rpartition("#")[2] for text in learnt(group, plain))
        assert right == str(total) != wrong and group.mask is None
