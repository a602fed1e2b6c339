"""Every language model generates with a cache as its packed forward predicts, for mixed lengths."""

from pathlib import Path

import pytest
import torch

from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.types import Request, Sampling
from tests.models.families import CASES, FAMILIES, case_name, write_reference

torch.set_num_threads(1)

PROMPT_LENGTHS = (1, 40, 7, 70)


def some_tokens(length: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_cached_equals_not_cached(case: tuple[str, str], tmp_path: Path) -> None:
    """Each drawn token's log-prob is that of a forward without cache: prompts of mixed length, shared by several
    completions, which join and leave while others go on."""
    model = load_model(write_reference(tmp_path, case), torch.float32).requires_grad_(False).eval()
    vocab_size, context = model.config.vocab_size, min(model.config.max_positions, 110)
    prompts = [some_tokens(min(length, context - 30), vocab_size, length) for length in PROMPT_LENGTHS]
    eos_ids = frozenset(range(0, vocab_size, 40))
    generator = NativeGenerator(model, eos_ids, context_tokens=context, max_sequences=6, cache_tokens=10_000)
    requests = [Request(prompt, n, seed) for seed, (prompt, n) in enumerate(zip(prompts, (3, 2, 1, 3), strict=True))]
    groups = generator.generate(requests, Sampling(max_tokens=30))
    completions = [completion for group in groups for completion in group]
    assert "stop" in {completion.finish_reason for completion in completions}
    whole = [
        prompt + completion.token_ids for prompt, group in zip(prompts, groups, strict=True) for completion in group
    ]
    scored = generator.logprobs(whole)
    for completion, logprobs in zip(completions, scored, strict=True):
        expected = logprobs[-len(completion.token_ids) :]
        assert completion.logprobs == pytest.approx(expected, abs=FAMILIES[case[0]].TOLERANCE * 2)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_shared_prompt_equals_a_repeated_one(case: tuple[str, str], tmp_path: Path) -> None:
    model = load_model(write_reference(tmp_path, case), torch.float32).requires_grad_(False).eval()
    prompt = some_tokens(33, model.config.vocab_size, 1)
    generator = NativeGenerator(model, frozenset(), context_tokens=60, max_sequences=8)
    sampling = Sampling(max_tokens=12)
    (shared,) = generator.generate([Request(prompt, 3, 5)], sampling)
    alone = [generator.generate([Request(prompt, n, 5)], sampling)[0][n - 1] for n in (1, 2, 3)]
    assert [completion.token_ids for completion in shared] == [completion.token_ids for completion in alone]
