"""Cached forwards equal packed forwards, for mixed lengths, shared prompts, and sequences that move and leave."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import MAX_PADDING_TOKENS, SlotCache, slot_buckets
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.llama import Llama, LlamaConfig
from tests.generation.hand_made import (
    HEAD_DIM,
    LATENT,
    MODELS,
    SIZE,
    VALUE_DIM,
    Attention,
    HandMade,
    Kind,
    Latent,
    Recurrent,
    windowed,
)


def make_llama() -> CausalLM:
    tiny = Llama(LlamaConfig.tiny())
    tiny.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # sharp attention: a wrong mask shows
    return tiny


MAKERS = {"llama": make_llama, **MODELS}


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest) -> Iterator[CausalLM]:
    with torch.inference_mode():
        yield MAKERS[request.param]()


def some_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefill(model: CausalLM, cache: SlotCache, prompts: Sequence[list[int]], slots: Sequence[int]) -> Tensor:
    layout = Layout(tuple(len(prompt) for prompt in prompts), (-1,) * len(prompts))
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    return model.hidden(tokens, layout.positions(), PrefillContext(cache, layout, slots)).states


def packed_states(model: CausalLM, prompt: list[int], completion: list[int]) -> Tensor:
    """States [len(completion)] of a plain forward over prompt and completion as one sequence."""
    layout = Layout((len(prompt + completion),), (-1,))
    tokens = torch.tensor(prompt + completion)
    return model.hidden(tokens, layout.positions(), PackedAttention(layout, "cpu")).states[len(prompt) :]


def test_cached_equals_packed_at_every_length_for_mixed_prompts_and_groups(model: CausalLM) -> None:
    prompts = [some_tokens(length, seed) for seed, length in enumerate((1, 40, 7, 23))]
    parents = [2, 0, 0, 1, 3, 0, 2]
    completions = [some_tokens(12, 50 + row) for row in range(len(parents))]
    prompt_cache, tail_cache = SlotCache(5, 41, "cpu"), SlotCache(7, 12, "cpu")
    packed = prefill(model, prompt_cache, prompts, [0, 1, 2, 3])
    starts = Layout(tuple(map(len, prompts)), (-1,) * 4).starts
    for prompt, start in zip(prompts, starts, strict=True):
        torch.testing.assert_close(packed[start : start + len(prompt)], packed_states(model, [], prompt))
    expected = [packed_states(model, prompts[parent], row) for parent, row in zip(parents, completions, strict=True)]
    for step in range(12):
        context = DecodeContext(prompt_cache, [len(p) for p in prompts], tail_cache, [step] * len(parents), parents)
        tokens = torch.tensor([row[step] for row in completions])
        positions = torch.tensor([len(prompts[parent]) + step for parent in parents])
        states = model.hidden(tokens, positions, context).states
        torch.testing.assert_close(states, torch.stack([row[step] for row in expected]), atol=1e-5, rtol=1e-5)


def test_sequences_of_different_age_and_moved_slots(model: CausalLM) -> None:
    prompts = [some_tokens(length, seed) for seed, length in enumerate((30, 4))]
    completions = [some_tokens(11, 70 + row) for row in range(3)]
    prompt_cache, tail_cache = SlotCache(3, 32, "cpu"), SlotCache(4, 11, "cpu")
    prefill(model, prompt_cache, prompts, [2, 0])
    prompt_cache.move(2, 1, len(prompts[0]))  # slots are now: prompt 1, prompt 0
    lengths = [4, 30]
    ages = [0, 0, 0]
    for steps, members in ((5, [0, 1, 2]), (2, [0, 1]), (3, [0, 1, 2])):
        for _ in range(steps):
            rows = [completions[i] for i in members]
            parents = [1, 0, 1][: len(members)]
            context = DecodeContext(prompt_cache, lengths, tail_cache, [ages[i] for i in members], parents)
            tokens = torch.tensor([row[ages[i]] for row, i in zip(rows, members, strict=True)])
            positions = torch.tensor([lengths[p] + ages[i] for p, i in zip(parents, members, strict=True)])
            states = model.hidden(tokens, positions, context).states
            for state, i, parent in zip(states, members, parents, strict=True):
                expected = packed_states(model, prompts[1 - parent], completions[i][: ages[i] + 1])[-1]
                torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
                ages[i] += 1
        if steps == 2:  # sequence 0 leaves; 2, whose slot was left alone, takes its place
            tail_cache.move(2, 0, ages[2])
            completions[0], ages[0] = completions[2], ages[2]
            completions[2], ages[2] = some_tokens(11, 99), 0


def test_what_a_slot_held_before_does_not_matter(model: CausalLM) -> None:
    def last_states(cache: SlotCache, tails: SlotCache) -> Tensor:
        prefill(model, cache, [some_tokens(5, 1)], [0])
        steps = [
            (torch.tensor([9 + i]), torch.tensor([5 + i]), DecodeContext(cache, [5], tails, [i], [0])) for i in range(4)
        ]
        return torch.cat([model.hidden(*step).states for step in steps])

    used, used_tails = SlotCache(2, 30, "cpu"), SlotCache(2, 20, "cpu")
    prefill(model, used, [some_tokens(30, 2), some_tokens(28, 3)], [0, 1])
    for step in range(20):
        model.hidden(
            torch.tensor([3]), torch.tensor([30 + step]), DecodeContext(used, [30, 28], used_tails, [step], [0])
        )
    used.move(0, 1, 30)
    used_tails.move(0, 1, 20)
    assert torch.equal(last_states(used, used_tails), last_states(SlotCache(1, 5, "cpu"), SlotCache(1, 4, "cpu")))


def test_bfloat16_models_keep_float32_scores(model: CausalLM) -> None:
    """Log-probs of a bfloat16 model by cache stay as near to its packed forward as bfloat16 states allow."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    prompt, completion = some_tokens(20, 1), some_tokens(6, 2)
    cache, tails = SlotCache(1, 20, "cpu"), SlotCache(1, 6, "cpu")
    prefill(half, cache, [prompt], [0])
    for step, expected in enumerate(packed_states(half, prompt, completion)):
        context = DecodeContext(cache, [20], tails, [step], [0])
        state = half.hidden(torch.tensor(completion[step : step + 1]), torch.tensor([20 + step]), context).states[0]
        torch.testing.assert_close(state, expected, atol=0.1, rtol=0.05)


def test_memory_is_what_each_layer_needs() -> None:
    """Windows keep rings, latent layers one tensor, recurrent ones their states: [slots, tokens, floats]."""
    model = HandMade(Attention, windowed(9), windowed(1000), Latent, lambda layer: Latent(layer, 5), Recurrent)
    prompts, tails = SlotCache(3, 40), SlotCache(4, 30)
    with torch.inference_mode():
        prefill(model, prompts, [some_tokens(35, 0)], [0])
        model.hidden(torch.tensor([1, 2]), torch.tensor([35, 35]), DecodeContext(prompts, [35], tails, [0, 0], [0, 0]))
    pair = 2 * (HEAD_DIM + VALUE_DIM)
    assert prompts.num_bytes == 4 * 3 * ((40 + 8 + 40) * pair + (40 + 4) * LATENT + 2 * SIZE)
    assert tails.num_bytes == 4 * 4 * ((30 + 9 + 30) * pair + (30 + 5) * LATENT + 2 * SIZE)


def test_a_window_bounds_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    window, length = 6, 40
    model, prompts, tails = HandMade(windowed(window)), SlotCache(2, length), SlotCache(3, length)
    read = []
    product = torch.bmm

    def counted(a: Tensor, b: Tensor) -> Tensor:
        read.append(b.numel())
        return product(a, b)

    with torch.inference_mode():
        prefill(model, prompts, [some_tokens(length, 0), some_tokens(length, 1)], [0, 1])
        monkeypatch.setattr(torch, "bmm", counted)
        for step in range(length):
            read.clear()
            context = DecodeContext(prompts, [length] * 2, tails, [step] * 3, [0, 0, 1])
            model.hidden(torch.tensor([1, 2, 3]), torch.tensor([length + step] * 3), context)
            in_prompts, in_tails = 2 * max(window - step - 1, 0), 3 * min(step + 1, window)
            assert sum(read) == (in_prompts + in_tails) * 2 * (HEAD_DIM + VALUE_DIM)


@pytest.mark.parametrize("kind", [Attention, windowed(4)])
def test_keys_that_are_values_are_kept_once(kind: Kind) -> None:
    window, heads, size = kind(0).window, 3, 8
    prompts, tails = SlotCache(1, 9), SlotCache(1, 6)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(15, count, size, generator=generator) for count in (heads, 1))
    expected = PackedAttention(Layout((15,), (-1,)), "cpu").attend(0, q, k, None, 0.5, window=window)
    first = PrefillContext(prompts, Layout((9,), (-1,)), [0]).attend(0, q[:9], k[:9], None, 0.5, window=window)
    torch.testing.assert_close(first, expected[:9])
    for i in range(6):
        new = slice(9 + i, 10 + i)
        out = DecodeContext(prompts, [9], tails, [i], [0]).attend(0, q[new], k[new], None, 0.5, window=window)
        torch.testing.assert_close(out, expected[new])
    assert tails.num_bytes == 4 * min(window or 6, 6) * size


def test_buckets_cover_every_slot_once_with_bounded_padding() -> None:
    lengths = torch.randint(1, 900, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    for order in (lengths, sorted(lengths), [7], []):
        buckets = slot_buckets(order)
        assert [slot for bucket in buckets for slot in range(bucket.start, bucket.stop)] == list(range(len(order)))
        for bucket in buckets:
            members = order[bucket.start : bucket.stop]
            assert bucket.length == max(members)
            assert bucket.length * len(members) - sum(members) <= MAX_PADDING_TOKENS
    assert len(slot_buckets([50] * 128)) == 1
    assert len(slot_buckets(sorted(lengths))) < len(slot_buckets(lengths)) / 4
