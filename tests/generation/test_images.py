"""Vision-language models generate with images as their full forward predicts, for every decoder."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmquest_rl.batch import Layout, SequenceGroup, collate
from llmquest_rl.generation.engine import NativeGenerator
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.llama import Llama, LlamaConfig
from llmquest_rl.models.vit import ViTConfig
from llmquest_rl.models.vlm import VLM, VLMConfig
from llmquest_rl.types import Completion, Request, Sampling
from tests.models.families import FAMILIES, LANGUAGE_MODELS

torch.set_num_threads(1)

TOWER = replace(ViTConfig.tiny(), labels=())
MARK = 255
IMAGE = [MARK] * TOWER.num_tokens

every_decoder = pytest.mark.parametrize("decoder", LANGUAGE_MODELS)


def vlm(decoder: str = "LlamaForCausalLM") -> VLM:
    """Random weights, large enough for images to matter."""
    model = VLM(VLMConfig(TOWER, architectures()[decoder].config.tiny(), "mlp", MARK))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.requires_grad_(False).eval()


def generator(model: CausalLM, max_sequences: int = 4) -> NativeGenerator:
    return NativeGenerator(model, frozenset(), context_tokens=64, max_sequences=max_sequences)


def pictures(number: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((number, 3, 16, 16)).astype(np.float32)


def requests() -> list[Request]:
    """One image before text, text alone, two images with text between; more completions than fit at once."""
    return [
        Request([*IMAGE, 1, 2, 3], 3, 1, pictures(1, 1)),
        Request([7, 8, 9], 2, 2),
        Request([4, *IMAGE, 5, *IMAGE, 6], 3, 3, pictures(2, 2)),
        Request([*IMAGE, 1, 2, 3], 2, 4, pictures(1, 3)),
    ]


def learner_logprobs(model: VLM, asked: Sequence[Request], groups: Sequence[Sequence[Completion]]) -> list[float]:
    """Log-probs of all completions in one packed forward, as a learner computes them."""
    sequence_groups = [
        SequenceGroup(
            request.prompt_ids,
            [completion.token_ids for completion in group],
            images=None if request.images is None else torch.from_numpy(request.images),
        )
        for request, group in zip(asked, groups, strict=True)
    ]
    units = (
        sequence_groups
        if model.shares_prompts
        else [part for sequence_group in sequence_groups for part in sequence_group.expanded()]
    )
    logprobs: list[float] = model(collate(units)).logprobs.tolist()
    return logprobs


@every_decoder
def test_log_probs_are_those_of_the_learner(decoder: str) -> None:
    model = vlm(decoder)
    groups = generator(model).generate(requests(), Sampling(max_tokens=8))
    assert [len(group) for group in groups] == [3, 2, 3, 2]
    drawn = [logprob for group in groups for completion in group for logprob in completion.logprobs]
    expected = learner_logprobs(model, requests(), groups)
    assert drawn == pytest.approx(expected, abs=FAMILIES[LANGUAGE_MODELS[decoder]].TOLERANCE * 4)
    others = [replace(r, images=None if r.images is None else -r.images) for r in requests()]
    seen = learner_logprobs(model, others, groups)
    assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) > 0.01, "images matter"


@every_decoder
def test_greedy_completions_are_those_of_full_forwards(decoder: str) -> None:
    model = vlm(decoder)
    groups = generator(model).generate(requests(), Sampling(max_tokens=5, temperature=0))
    for request, (first, *rest) in zip(requests(), groups, strict=True):
        assert all(completion.token_ids == first.token_ids for completion in rest)
        assert first.token_ids == greedily(model, request, 5)


def greedily(model: VLM, request: Request, length: int) -> list[int]:
    """Each token by a forward over everything before it, without a cache."""
    images = None if request.images is None else torch.from_numpy(request.images)
    counts = [0 if images is None else len(images), 0]
    tokens: list[int] = []
    for _ in range(length):
        layout = Layout((len(request.prompt_ids), len(tokens)), (-1, 0))
        context = PackedAttention(layout, "cpu")
        whole = torch.tensor(request.prompt_ids + tokens)
        states = model.hidden(whole, layout.positions(), context, images, counts).states
        tokens.append(int(model.logits(states[-1:]).argmax()))
    return tokens


def test_images_of_a_group_are_computed_once() -> None:
    model = vlm()
    seen: list[int] = []
    model.vision.patches.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    generator(model, max_sequences=2).generate(requests(), Sampling(max_tokens=3))
    assert sum(seen) == 4, "however often completions of a group join"


def test_a_completion_does_not_depend_on_its_company() -> None:
    model = vlm()
    together = generator(model).generate(requests(), Sampling(max_tokens=6))
    alone = [generator(model).generate([request], Sampling(max_tokens=6))[0] for request in requests()]
    assert [[c.token_ids for c in group] for group in together] == [[c.token_ids for c in group] for group in alone]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([*IMAGE, 1], 1, 0), "request 1 has 5 image tokens \\(id 255\\), but its 0 images need 5 each"),
        (Request([1], 1, 0, pictures(1, 0)), "request 1 has 0 image tokens .*, but its 1 images need 5 each"),
        (Request([*IMAGE[1:], 1], 1, 0, pictures(1, 0)), "request 1 has 4 image tokens"),
        (Request([*IMAGE, 1], 1, 0, pictures(1, 0)[:, :, :8]), "request 1 has images of \\[3, 8, 16\\]"),
        (Request([*IMAGE, 1], 1, 0, pictures(1, 0)[0]), "request 1 has images of"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(request_: Request, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        generator(vlm()).generate([requests()[0], request_], Sampling(max_tokens=1))


def test_a_text_model_refuses_images() -> None:
    with pytest.raises(ValueError, match="request 0 has 1 images, but the model \\(Llama\\) reads text only"):
        generator(Llama(LlamaConfig.tiny())).generate([Request([1], 1, 0, pictures(1, 0))], Sampling(max_tokens=1))
