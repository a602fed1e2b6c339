"""The ends of tokens in text: no byte is lost, and no text is cut inside a character."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.data.token_scores import INSIDE, EndTokenizer, Tokens, cut
from llmquest_rl.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def ends_of(tokenizer: Tokenizer) -> EndTokenizer:
    return EndTokenizer(tokenizer, "SmolLM2")


def test_the_tokens_of_a_text_end_where_their_texts_end(ends_of: EndTokenizer, tokenizer: Tokenizer) -> None:
    text = "Let the  parabola\n\n  be y = x^2.\t"
    tokens = ends_of(text)
    assert tokens.ids == tokenizer.encode(text, add_special_tokens=False)
    pieces = [text[begin:end] for begin, end in pairwise([0, *tokens.ends])]
    assert "".join(pieces) == text
    assert pieces == [ends_of.text(id_) for id_ in tokens.ids], "with the spaces in front of words"


def test_a_character_of_several_tokens_is_not_cut(ends_of: EndTokenizer) -> None:
    text = "a\U0001f9ec\u0f40b"
    tokens = ends_of(text)
    assert INSIDE in tokens.ends and tokens.ends[-1] == len(text)
    valid = [end for end in tokens.ends if end != INSIDE]
    assert valid == sorted(valid) and set(valid) <= {1, 2, 3, 4}


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40), length=st.integers(8, 12))
def test_any_text_is_cut_into_parts_between_characters(ends_of: EndTokenizer, text: str, length: int) -> None:
    tokens = ends_of(text)
    ranges = list(cut(tokens, length))
    assert [i for first, stop in ranges for i in range(first, stop)] == list(range(len(tokens.ids)))
    assert all(stop - first <= length for first, stop in ranges)
    assert all(tokens.ends[stop - 1] != INSIDE for _, stop in ranges[:-1])


def test_parts_end_before_a_character_that_does_not_fit() -> None:
    tokens = Tokens(list(range(6)), [1, 2, INSIDE, INSIDE, 3, 4])
    assert list(cut(tokens, 4)) == [(0, 2), (2, 6)]
