"""The rewards of next-token reasoning: equation 3 of RPT by brute force, and the likelihood gain of RLP."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.builtin import likelihood_gain, next_token
from rewards.builtin.next_token import Config, reward

GOLD = " para dé "


def box(prediction: str) -> str:
    return f"<think>hm</think>So \\boxed{{{prediction}}}"


@given(st.lists(st.text(st.characters(exclude_characters="{}\\", codec="utf-8"), min_size=1), min_size=1), st.data())
def test_the_prefix_reward_is_equation_3(tokens: list[str], data: st.DataObject) -> None:
    """The reward is 1 exactly for the texts of the first tokens, the first two, ... and for no other text."""
    gold = "".join(tokens)
    boundaries = [len("".join(tokens[: i + 1]).encode()) for i in range(len(tokens))]
    said = gold[: data.draw(st.integers(0, len(gold)))] + data.draw(st.sampled_from(["", "x", " "]))
    if "<" in said or "<" in gold:
        return
    expected = said in {"".join(tokens[: i + 1]) for i in range(len(tokens))}
    assert reward(box(said), gold, Config(), boundaries) == float(expected)


@pytest.mark.parametrize(
    ("said", "prefix", "first"),
    [
        (" para", 1.0, 1.0),
        (" para ", 0.0, 1.0),
        (" para d", 0.0, 1.0),
        (" para dé", 1.0, 1.0),
        (" para dé ", 1.0, 1.0),
        (" para dé !", 0.0, 1.0),
        (" par", 0.0, 0.0),
        ("para", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_prefix_and_first_token(said: str, prefix: float, first: float) -> None:
    boundaries = [len(text.encode()) for text in (" para", " para dé", GOLD)]
    assert reward(box(said), GOLD, Config(), boundaries) == prefix
    assert reward(box(said), GOLD, Config(match="first_token"), boundaries) == first


def test_a_wrong_prediction_gets_the_models_probability_with_dense() -> None:
    config, likely = Config(match="dense"), {" d": 0.5, " do": 0.25, " para": 0.125}
    rewards = [reward(box(said), GOLD, config, [5], likely) for said in (" para", " dog", " dig", " x", "")]
    assert rewards == [1.0, 0.25, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="column `likely`"):
        reward(box(" dog"), GOLD, config, [5])


def test_a_prediction_without_a_thought_counts_only_if_it_is_allowed_to() -> None:
    assert reward("\\boxed{ para}", " para", Config()) == 0.0
    assert reward("\\boxed{ para}", " para", Config(thinking="optional")) == 1.0
    with pytest.raises(ValueError, match="continuation is empty"):
        reward(box("a"), "", Config())


@given(st.text(max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    for match in next_token.MATCHES:
        assert 0.0 <= reward(text, " para", Config(match=match), [5], {" d": 0.5}) <= 1.0  # type: ignore[arg-type]
        assert 0.0 <= reward(f"</think>\\boxed{{{text}}}", " para", Config(match=match), [5], {" d": 0.5}) <= 1.0  # type: ignore[arg-type]


def test_the_likelihood_gain_is_what_the_thought_adds() -> None:
    config = likelihood_gain.Config()
    assert likelihood_gain.reward(config, -1.0, 2, -4.0) == 1.5
    assert likelihood_gain.reward(likelihood_gain.Config(per_token=False), -1.0, 2, -4.0) == 3.0
    assert likelihood_gain.reward(likelihood_gain.Config(floor=-2.0), -40.0, 1, 0.0) == -2.0
    assert likelihood_gain.reward(config) is None
