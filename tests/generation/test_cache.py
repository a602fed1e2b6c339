"""The cache gives what the packed forward gives: mixed lengths, shared prompts, sequences that move and leave."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention import PackedAttention
from llmquest_rl.layers.cache import CALL_COST, Decode, Prefill, SlotCache, buckets
from llmquest_rl.models.llama import Llama, LlamaConfig


@pytest.fixture(scope="module")
def model() -> Llama:
    tiny = Llama(LlamaConfig.tiny())
    tiny.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # sharp attention: a wrong mask shows
    return tiny.requires_grad_(False)


def some_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefill(model: Llama, cache: SlotCache, prompts: Sequence[list[int]], slots: Sequence[int]) -> Tensor:
    layout = Layout(tuple(len(prompt) for prompt in prompts), (-1,) * len(prompts))
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    return model.hidden(tokens, layout.positions(), Prefill(cache, layout, slots)).states


def packed_states(model: Llama, prompt: list[int], completion: list[int]) -> Tensor:
    """States [len(completion)] of a plain forward over prompt and completion as one sequence."""
    layout = Layout((len(prompt + completion),), (-1,))
    tokens = torch.tensor(prompt + completion)
    return model.hidden(tokens, layout.positions(), PackedAttention(layout, "cpu")).states[len(prompt) :]


def test_cached_equals_packed_at_every_length_for_mixed_prompts_and_groups(model: Llama) -> None:
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
        context = Decode(prompt_cache, [len(p) for p in prompts], tail_cache, [step] * len(parents), parents)
        tokens = torch.tensor([row[step] for row in completions])
        positions = torch.tensor([len(prompts[parent]) + step for parent in parents])
        states = model.hidden(tokens, positions, context).states
        torch.testing.assert_close(states, torch.stack([row[step] for row in expected]), atol=1e-5, rtol=1e-5)


def test_sequences_of_different_age_and_moved_slots(model: Llama) -> None:
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
            context = Decode(prompt_cache, lengths, tail_cache, [ages[i] for i in members], parents)
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


def test_what_a_slot_held_before_does_not_matter(model: Llama) -> None:
    def last_state(cache: SlotCache, tails: SlotCache) -> Tensor:
        prefill(model, cache, [some_tokens(5, 1)], [0])
        context = Decode(cache, [5], tails, [0], [0])
        return model.hidden(torch.tensor([9]), torch.tensor([5]), context).states

    used, used_tails = SlotCache(2, 30, "cpu"), SlotCache(2, 20, "cpu")
    prefill(model, used, [some_tokens(30, 2), some_tokens(28, 3)], [0, 1])
    for step in range(20):
        model.hidden(torch.tensor([3]), torch.tensor([30 + step]), Decode(used, [30, 28], used_tails, [step], [0]))
    assert torch.equal(last_state(used, used_tails), last_state(SlotCache(1, 5, "cpu"), SlotCache(1, 4, "cpu")))


def test_bfloat16_models_keep_float32_scores(model: Llama) -> None:
    """Log-probs of a bfloat16 model by cache stay as near to its packed forward as bfloat16 states allow."""
    half = Llama(LlamaConfig.tiny()).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.requires_grad_(False)
    prompt, completion = some_tokens(20, 1), some_tokens(6, 2)
    cache, tails = SlotCache(1, 20, "cpu"), SlotCache(1, 6, "cpu")
    prefill(half, cache, [prompt], [0])
    for step, expected in enumerate(packed_states(half, prompt, completion)):
        context = Decode(cache, [20], tails, [step], [0])
        state = half.hidden(torch.tensor(completion[step : step + 1]), torch.tensor([20 + step]), context).states[0]
        torch.testing.assert_close(state, expected, atol=0.1, rtol=0.05)


def test_buckets_cover_every_slot_once_with_bounded_padding() -> None:
    lengths = torch.randint(1, 900, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    for order in (lengths, sorted(lengths), [7], []):
        runs = buckets(order)
        assert [slot for run in runs for slot in range(run.start, run.stop)] == list(range(len(order)))
        for run in runs:
            members = order[run.start : run.stop]
            assert run.length == max(members)
            assert run.length * len(members) - sum(members) <= CALL_COST
    assert len(buckets([50] * 128)) == 1
    assert len(buckets(sorted(lengths))) < len(buckets(lengths)) / 4
