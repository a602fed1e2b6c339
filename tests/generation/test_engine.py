"""Continuous batching: the same completions in any batch, and exactly the model's own log-probs."""

import random
from collections.abc import Sequence

import pytest
import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.generation.batch import GenerationError
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.llama import Llama, LlamaConfig
from llmquest_rl.types import Completion, Request, Sampling
from tests.generation.hand_made import MODELS

EOS = frozenset({7, 200})
Groups = list[list[Completion]]


def make_model(seed: int = 0) -> Llama:
    model = Llama(LlamaConfig.tiny())
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.requires_grad_(False)


MODEL = make_model()


def letters(sequences: list[list[int]], stop: Sequence[str] = ()) -> list[str]:
    """A decoder for the tiny vocabulary: token t is letter t mod 26; tokens from 250 on are special."""
    texts = ["".join(chr(97 + token % 26) for token in tokens if token < 250) for tokens in sequences]
    ends = [min((i for string in stop if (i := text.find(string)) >= 0), default=None) for text in texts]
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def make_generator(model: CausalLM = MODEL, **options: int) -> NativeGenerator:
    return NativeGenerator(model, EOS, **{"context_tokens": 96, **options}, texts=letters)


def make_requests(count: int, seed: int = 0, longest: int = 50, n: int = 5) -> list[Request]:
    source = random.Random(seed)
    prompts = [[source.randrange(256) for _ in range(source.randint(1, longest))] for _ in range(count)]
    return [Request(prompt, source.randint(1, n), seed=100 + i) for i, prompt in enumerate(prompts)]


def tokens_of(groups: Groups) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def largest_gap(generator: NativeGenerator, requests: list[Request], groups: Groups, temperature: float = 1.0) -> float:
    """Largest difference between the completions' log-probs and those of a packed forward of the model."""
    gaps = []
    for request, group in zip(requests, groups, strict=True):
        batch = collate([SequenceGroup(request.prompt_ids, [completion.token_ids for completion in group])])
        expected = generator.model(batch, temperature=temperature).logprobs
        given = torch.tensor([value for completion in group for value in completion.logprobs])
        gaps.append(float((given - expected).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_models_own(temperature: float) -> None:
    generator, requests = make_generator(max_sequences=16), make_requests(12)
    groups = generator.generate(requests, Sampling(temperature=temperature, max_tokens=25))
    assert [len(group) for group in groups] == [request.n for request in requests]
    assert largest_gap(generator, requests, groups, temperature or 1.0) < 1e-5


@pytest.mark.parametrize("name", ["windows within tails", "softcap and sinks", "windowed latent", "recurrent", "mixed"])
def test_any_kind_of_layer_while_completions_come_and_go(name: str) -> None:
    """Rows leave, rows and prompts move, slots are used again: the log-probs stay the model's own."""
    model, eos_ids = MODELS[name]().requires_grad_(False), frozenset(range(0, 256, 16))
    generator, sampling = NativeGenerator(model, eos_ids, 96, max_sequences=5), Sampling(max_tokens=24)
    requests = make_requests(9)
    groups = generator.generate(requests, sampling)
    assert len({len(completion.token_ids) for group in groups for completion in group}) > 5
    assert largest_gap(generator, requests, groups) < 1e-5
    generator.generate(make_requests(6, seed=5, longest=45), sampling)
    assert generator.generate(requests, sampling) == groups
    assert tokens_of(NativeGenerator(model, eos_ids, 96).generate(requests, sampling)) == tokens_of(groups)


def test_logprobs_of_given_tokens_are_the_models_own() -> None:
    generator, requests = make_generator(), make_requests(6)
    groups = generator.generate(requests, Sampling(max_tokens=9))
    sequences = [request.prompt_ids + group[0].token_ids for request, group in zip(requests, groups, strict=True)]
    found = generator.logprobs([*sequences, [5], []])
    assert [len(values) for values in found] == [len(sequence) - 1 for sequence in sequences] + [0, 0]
    for request, group, values in zip(requests, groups, found, strict=False):
        assert values[len(request.prompt_ids) - 1 :] == pytest.approx(group[0].logprobs, abs=1e-5)
    assert generator.logprobs([]) == []


def test_the_same_requests_give_the_same_bits_whatever_came_before() -> None:
    requests, sampling = make_requests(10), Sampling(max_tokens=20)
    generator = make_generator(max_sequences=12)
    first = generator.generate(requests, sampling)
    generator.generate(make_requests(20, seed=5, longest=70), Sampling(max_tokens=25, temperature=1.4))
    assert generator.generate(requests, sampling) == first
    generator.release()
    assert generator.cache_bytes == 0
    assert (
        generator.generate(requests, sampling) == first == make_generator(max_sequences=12).generate(requests, sampling)
    )


def test_a_completion_does_not_depend_on_its_company() -> None:
    requests, sampling = make_requests(9), Sampling(max_tokens=20, top_p=0.95)
    together = make_generator().generate(requests, sampling)
    for request, group in zip(requests, together, strict=True):
        alone = make_generator().generate([request], sampling)[0]
        assert tokens_of([alone]) == tokens_of([group])
        for one, other in zip(alone, group, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_more_completions_leave_the_first_ones_as_they_were() -> None:
    few, many = (make_generator().generate([Request([3, 4, 5], n, 9)], Sampling(max_tokens=15))[0] for n in (2, 6))
    assert tokens_of([few]) == tokens_of([many[:2]])
    assert len({tuple(completion.token_ids) for completion in many}) == 6
    other_seed = make_generator().generate([Request([3, 4, 5], 2, 10)], Sampling(max_tokens=15))[0]
    assert tokens_of([other_seed]) != tokens_of([few])


def test_a_shared_prompt_equals_a_repeated_one() -> None:
    prompt, sampling = make_requests(1, longest=40)[0].prompt_ids, Sampling(max_tokens=20)
    generator = make_generator()
    shared = generator.generate([Request(prompt, 6, 1)], Sampling(max_tokens=20, temperature=0))
    repeated = generator.generate(
        [Request(prompt, 1, seed) for seed in range(6)], Sampling(max_tokens=20, temperature=0)
    )
    assert tokens_of(shared)[0] == [group[0] for group in tokens_of(repeated)]
    requests = [Request(prompt, 6, 1)]
    assert largest_gap(generator, requests, generator.generate(requests, sampling)) < 1e-5


@pytest.mark.parametrize(("max_sequences", "cache_tokens"), [(1, 10_000), (3, 10_000), (64, 80), (64, 200)])
def test_a_batch_or_cache_too_small_for_all_at_once_gives_the_same(max_sequences: int, cache_tokens: int) -> None:
    requests, sampling = make_requests(10), Sampling(max_tokens=20)
    expected = make_generator().generate(requests, sampling)
    generator = make_generator(max_sequences=max_sequences, cache_tokens=cache_tokens)
    assert tokens_of(generator.generate(requests, sampling)) == tokens_of(expected)
    per_token = 2 * 2 * 4 * MODEL.config.num_kv_heads * MODEL.config.head_dim  # layers, keys and values, bytes
    assert 0 < generator.cache_bytes <= cache_tokens * per_token


def test_completions_end_at_eos_or_at_the_limit() -> None:
    requests = make_requests(8, n=8)
    groups = make_generator().generate(requests, Sampling(max_tokens=40, temperature=2.5))
    completions = [completion for group in groups for completion in group]
    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    assert ended and len(ended) < len(completions)
    assert all(completion.token_ids[-1] in EOS for completion in ended)
    assert all(not EOS & set(completion.token_ids[:-1]) for completion in completions)
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert all(len(completion.token_ids) == 40 for completion in cut)
    assert all(completion.text == letters([completion.token_ids])[0] for completion in completions)


def test_the_context_limits_a_completion() -> None:
    group = make_generator(context_tokens=20).generate([Request(list(range(8, 26)), 2, 0)], Sampling(temperature=3.0))[
        0
    ]
    assert all(len(completion.token_ids) == 2 and completion.finish_reason == "length" for completion in group)


def test_stop_strings_end_the_text_before_and_the_tokens_after_them() -> None:
    requests, sampling = make_requests(6), Sampling(max_tokens=40, temperature=2.0)
    free = make_generator().generate(requests, sampling)
    stop = (free[0][0].text[5:8], free[1][0].text[3:4])
    stopped = make_generator().generate(requests, sampling.model_copy(update={"stop": stop}))
    for completion, whole in zip(stopped[0] + stopped[1], free[0] + free[1], strict=True):
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert completion.text == letters([whole.token_ids], stop)[0]
        if any(string in whole.text for string in stop):
            assert completion.finish_reason == "stop"
            assert not any(string in letters([completion.token_ids[:-1]])[0] for string in stop)
    assert stopped[0][0].finish_reason == "stop" and len(stopped[0][0].token_ids) < len(free[0][0].token_ids)


def test_weights_changed_in_place_are_used_at_once() -> None:
    model, other = make_model(0), make_model(1)
    generator, requests = make_generator(model), make_requests(5)
    sampling = Sampling(max_tokens=12)
    before = generator.generate(requests, sampling)
    model.load_state_dict(other.state_dict())
    generator.version = 3
    after = generator.generate(requests, sampling)
    assert tokens_of(after) != tokens_of(before)
    assert largest_gap(make_generator(other), requests, after) < 1e-5
    assert {completion.weight_version for group in after for completion in group} == {3}


def test_nothing_asked_nothing_given() -> None:
    generator = make_generator()
    assert generator.generate([], Sampling()) == []
    assert generator.generate([Request([1, 2], 0, 0)], Sampling()) == [[]]
    assert generator.cache_bytes == 0


@pytest.mark.parametrize(
    ("request_", "sampling", "message"),
    [
        (Request([], 1, 0), Sampling(), "request 1 has an empty prompt"),
        (Request([1] * 96, 1, 0), Sampling(), "request 1 has a prompt of 96 tokens.*context of 96"),
        (Request([1, 256], 1, 0), Sampling(), "request 1 contains token 256"),
        (Request([1] * 80, 1, 0), Sampling(max_tokens=16), "cache_tokens to 96"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(request_: Request, sampling: Sampling, message: str) -> None:
    generator = make_generator(cache_tokens=90)
    with pytest.raises(ValueError, match=message):
        generator.generate([Request([1], 1, 0), request_], sampling)
    assert generator.cache_bytes == 0


def test_stop_strings_need_a_decoder() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        NativeGenerator(MODEL, EOS, 96).generate([Request([1], 1, 0)], Sampling(stop=("x",)))


def test_broken_weights_are_an_error_that_names_the_request() -> None:
    model = make_model()
    generator = make_generator(model)
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.down.weight").fill_(float("nan"))
    with pytest.raises(GenerationError, match="request 0, completion 0.*NaN"):
        generator.generate([Request([1, 2], 2, 0)], Sampling())
    model.load_state_dict(MODEL.state_dict())
    requests = make_requests(3)
    assert generator.generate(requests, Sampling(max_tokens=5)) == make_generator().generate(
        requests, Sampling(max_tokens=5)
    )
