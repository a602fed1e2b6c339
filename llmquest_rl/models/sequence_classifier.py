"""A sequence classifier: any decoder of this folder, with one number for each label in place of its output layer.

The numbers are read at the sources of the targets, usually the last token of the text, which attends to all of it. With
several labels it is a classifier of texts (Radford et al. 2018, *Improving Language Understanding by Generative
Pre-Training*, section 3.2), with one label a reward model (Stiennon et al. 2020, arXiv:2009.01325, section 3.4).
Modules for multi-token prediction are left out, because they need the output layer.
Shapes: T tokens of a pack, D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmquest_rl.batch import TokenBatch
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.linear import Linear
from llmquest_rl.models import llama
from llmquest_rl.models.architectures import model_files
from llmquest_rl.models.base import CausalLM, ClassifierModel, DecoderWrapperConfig, Scores
from llmquest_rl.models.config.labels import label_fields, pooling_fields, read_labels, read_pooling
from llmquest_rl.models.weight_map import Form, HFMap
from llmquest_rl.types import Pooling


@cache
def decoders() -> dict[str, HFMap]:
    """Return the decoder of each classifier, by the classifier's name on the Hub."""
    maps: list[HFMap] = [module.HF for module in model_files() if hasattr(module, "HF")]
    return {hf.classifier: hf for hf in maps if hf.classifier is not None}


@dataclass(frozen=True)
class SequenceClassifierConfig(DecoderWrapperConfig):
    """The shape of the decoder, and the labels."""

    architecture: str
    """The classifier's name on the Hub, a key of `decoders()`."""
    text: Any
    """The decoder's configuration, without modules for multi-token prediction."""
    labels: tuple[str, ...]
    pooling: Pooling | None = None
    """The tokens at which a reward model was trained to be read; None = the folder does not say it."""

    @property
    def decoder(self) -> HFMap:
        """The map of the decoder."""
        return decoders()[self.architecture]

    @classmethod
    def of_decoder(cls, hf: HFMap, text: Any, labels: tuple[str, ...], pooling: Pooling | None = None) -> Self:
        """Return the configuration of a classifier of `labels` that is made of the decoder `hf` with shape `text`."""
        assert hf.classifier is not None, f"no classifier is made of {hf.architecture}"
        return cls(hf.classifier, hf.fit(text, ()), labels, pooling)  # without keys on disk there are no MTP modules

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json.

        Raises:
            ValueError: the decoder refuses the shape, the fields of the labels contradict each other, or the pooling
                is unknown.
        """
        hf = decoders()[values["architectures"][0]]
        return cls.of_decoder(hf, hf.config.from_hf(values), read_labels(values), read_pooling(values))

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 reads."""
        fields = {**label_fields(self.labels), **pooling_fields(self.pooling)}
        return {**self.text.to_hf(), "architectures": [self.architecture], **fields}

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: three labels on a Llama."""
        return cls.of_decoder(llama.HF, llama.LlamaConfig.tiny(), ("LABEL_0", "LABEL_1", "LABEL_2"))


class SequenceClassifier(ClassifierModel):
    """A decoder with one linear layer in place of its output layer."""

    new_head = "score"

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__(config)
        decoder = config.decoder.model(config.text)
        assert isinstance(decoder, CausalLM), "every entry of decoders() is a language model"
        decoder.head = nn.Identity()  # type: ignore[assignment]
        self.decoder = decoder
        self.score = Linear(config.text.hidden_size, len(config.labels), bias=False)

    @property
    def shares_prompts(self) -> bool:
        """See `Model.shares_prompts`; the decoder decides."""
        return self.decoder.shares_prompts

    def stays_float32(self, name: str) -> bool:
        """See `Model.stays_float32`."""
        return name.startswith("decoder.") and self.decoder.stays_float32(name.removeprefix("decoder."))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """See `Model.init_weights`; the decoder draws its own weights."""
        self.decoder.init_weights(generator)
        self.init_head(generator)

    @torch.no_grad()
    def init_head(self, generator: torch.Generator) -> None:
        """Draw the head normal with variance 1 / (D + 1): scores start near 1 (Stiennon et al. 2020, appendix B.1)."""
        weight = self.score.weight
        values = torch.empty(weight.shape, dtype=torch.float32)
        weight.copy_(values.normal_(0.0, (weight.shape[1] + 1) ** -0.5, generator=generator))

    def forward(self, batch: TokenBatch) -> Scores:
        """See `ClassifierModel.forward`.

        Raises:
            ValueError: the batch has images; a text model would ignore them.
        """
        if batch.images is not None:
            raise ValueError(f"the batch has images, but {self.config.architecture} reads text only")
        self.decoder.gradient_checkpointing = self.gradient_checkpointing
        context = PackedAttention(batch.layout, batch.tokens.device)
        states, aux, loads = self.decoder.hidden(batch.tokens, batch.positions, context)  # [T, D]
        self.decoder.record_router_load(loads, batch)
        return Scores(self.score(states.index_select(0, batch.sources)).float(), aux)

    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """See `CausalLM.after_update`; the routers belong to the decoder."""
        return self.decoder.after_update(applied, all_reduce)


def _map(architecture: str, decoder: HFMap) -> HFMap:
    """Return the map of a decoder's classifier: the decoder's names without its output layer, and the new head."""

    def names(config: SequenceClassifierConfig) -> dict[str, str | Form]:
        table = decoder.table(config.text)
        return {f"decoder.{ours}": row for ours, row in table.items() if ours != "head"} | {"score": "score"}

    return HFMap(
        architecture=architecture,
        config=SequenceClassifierConfig,
        model=SequenceClassifier,
        names=names,
        ignored=decoder.ignored,
        prefix=decoder.prefix,
        copies=lambda config: decoder.copies(config.text),
    )


@cache
def hf_maps() -> dict[str, HFMap]:
    """Return the map of each decoder's classifier, by the classifier's name on the Hub."""
    return {architecture: _map(architecture, decoder) for architecture, decoder in decoders().items()}
