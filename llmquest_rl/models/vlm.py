"""A vision-language model with early fusion: any decoder of this folder reads an image as tokens before its text.

A Vision Transformer turns an image into one vector for each patch, and an adapter maps them to the width of the decoder
(Liu et al. 2023, arXiv:2304.08485, section 4.1; as an MLP: arXiv:2310.03744, section 3.2), where they take the place of
embeddings. The decoder treats them like text: with causal attention, positions and a key/value cache.
Shapes: T tokens of a pack, N images, S vision tokens of an image, D hidden size of the decoder.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmquest_rl.batch import Layout, TokenBatch
from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.fused_embedding import FusedEmbedding
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.models import vit
from llmquest_rl.models.architectures import find_architecture
from llmquest_rl.models.base import CausalLM, DecoderWrapperConfig, Hidden, Model, Output
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.vit import ViT, ViTConfig
from llmquest_rl.models.weight_map import Experts, Form, HFMap
from llmquest_rl.soft_targets import TeacherHead
from llmquest_rl.types import ImageFormat


class MLPAdapter(nn.Module):
    """Two linear layers with a GELU between them (LLaVA-1.5)."""

    def __init__(self, vision_size: int, size: int) -> None:
        super().__init__()
        self.up = Linear(vision_size, size)
        self.down = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., vision_size]` to `[..., size]`."""
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


ADAPTERS: dict[str, Callable[[int, int], nn.Module]] = {"linear": Linear, "mlp": MLPAdapter}
"""The adapters by name: constructors that take the width of the vision tower and the width of the decoder."""


@dataclass(frozen=True)
class VLMConfig(DecoderWrapperConfig):
    """The shapes of the vision tower and the decoder, and the adapter between them."""

    vision: ViTConfig
    text: Any
    """The configuration of a decoder of this folder."""
    adapter: str
    """One of `ADAPTERS`."""
    image_token_id: int
    """Marks a vision token among the token ids: a reserved token that never occurs in text."""
    frozen: tuple[str, ...] = ()
    """Shell patterns of weights that are not trained, for example `vision.*`."""

    def __post_init__(self) -> None:
        """Refuse impossible values; messages use the names of config.json."""
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter {self.adapter!r} is not implemented: expected one of {', '.join(ADAPTERS)}")
        if not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is not in the vocabulary of {self.vocab_size}")

    @property
    def image_format(self) -> ImageFormat:
        return replace(self.vision.image_format, token_id=self.image_token_id)

    @property
    def language(self) -> HFMap:
        """The decoder's map of names on disk."""
        return _language(self.text.to_hf())

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json.

        Raises:
            ValueError: a field is missing, or the configuration of a part is refused.
        """
        try:
            tower, text = values["vision_config"], values["text_config"]
            if find_architecture(tower, Path("vision_config")) is not vit.HF:
                raise ValueError(f"vision_config names {tower['architectures'][0]}: expected {vit.HF.architecture}")
            return cls(
                vision=replace(ViTConfig.from_hf(tower), labels=()),
                text=_language(text).config.from_hf(text),
                adapter=values["adapter"],
                image_token_id=values["image_token_id"],
                frozen=tuple(values.get("frozen", ())),
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a vision-language model lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that only this package reads; a `model_type` would make transformers warn."""
        return {
            "architectures": [HF.architecture],
            "vision_config": self.vision.to_hf(),
            "text_config": self.text.to_hf(),
            "adapter": self.adapter,
            "image_token_id": self.image_token_id,
            "frozen": list(self.frozen),
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: 5 vision tokens before a Llama's text."""
        return cls(replace(ViTConfig.tiny(), labels=()), LlamaConfig.tiny(), "mlp", image_token_id=255)


def _language(values: dict[str, Any]) -> HFMap:
    found = find_architecture(values, Path("text_config"))
    if not issubclass(found.model, CausalLM) or found is HF:
        raise ValueError(f"text_config names {found.architecture}, which is not a text decoder")
    return found


class VLM(CausalLM):
    """A vision tower, an adapter and a decoder."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        decoder = config.language.model(config.text)
        assert isinstance(decoder, CausalLM), "VLMConfig accepts language models only"
        self.vision = ViT(config.vision)
        self.adapter = ADAPTERS[config.adapter](config.vision.hidden_size, config.text.hidden_size)
        self.decoder = decoder
        embedding = decoder.get_submodule("embedding")
        assert isinstance(embedding, nn.Embedding), "every decoder has an `nn.Embedding` named `embedding`"
        self.decoder.embedding = FusedEmbedding(embedding)
        self._freeze(config.frozen)

    def _freeze(self, patterns: Sequence[str]) -> None:
        weights = dict(self.named_parameters())
        for pattern in patterns:
            names = [name for name in weights if fnmatch(name, pattern)]
            if not names:
                raise ValueError(f"frozen: {pattern!r} matches no weight; names begin vision., adapter. or decoder.")
            for name in names:
                weights[name].requires_grad_(False)

    @property
    def head(self) -> LMHead:  # type: ignore[override]
        """The decoder's output layer. It is not registered as a module, or its weight would have two names."""
        return self.decoder.head

    @property
    def shares_prompts(self) -> bool:
        """See `Model.shares_prompts`; the decoder decides."""
        return self.decoder.shares_prompts

    def stays_float32(self, name: str) -> bool:
        """See `Model.stays_float32`; the part that holds the weight decides."""
        part, _, rest = name.partition(".")
        owner = self.get_submodule(part)
        return isinstance(owner, Model) and owner.stays_float32(rest)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """See `Model.init_weights`; each part draws its own weights."""
        super().init_weights(generator)
        self.vision.init_weights(generator)
        self.decoder.init_weights(generator)

    def forward(self, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False) -> Output:
        """See `CausalLM.forward`; the images of a prompt are placed at its tokens `image_token_id`.

        Raises:
            ValueError: a prompt has more or fewer image tokens than its images need, or images have another size.
        """
        with self._seeing(batch.images):
            output: Output = self.decoder(self._for_decoder(batch), temperature, entropy)
            return output

    def distributions(self, batch: TokenBatch) -> TeacherHead:
        """See `CausalLM.distributions`."""
        with torch.no_grad(), self._seeing(batch.images):
            return self.decoder.distributions(self._for_decoder(batch))

    def _for_decoder(self, batch: TokenBatch) -> TokenBatch:
        tokens = self._numbered(batch.tokens, batch.layout, batch.image_counts)
        return replace(batch, tokens=tokens, images=None, image_counts=())

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        images: Tensor | None = None,
        image_counts: Sequence[int] = (),
    ) -> Hidden:
        """See `CausalLM.hidden`.

        Args:
            tokens: Token ids `[T]`, with `image_token_id` in place of each vision token.
            positions: Position ids `[T]`.
            context: Decides which tokens attend to which; also the context of a prefill or of decoding.
            images: Pixels `[N, channels, height, width]` of all segments in order; None = text only.
            image_counts: Number of images of each segment; empty without images.

        Raises:
            ValueError: see `forward`.
        """
        if not context.is_decoding:  # sampled tokens are text, also those with the id of an image token
            tokens = self._numbered(tokens, context.layout, image_counts)
        with self._seeing(images):
            return self.decoder.hidden(tokens, positions, context)

    @contextmanager
    def _seeing(self, images: Tensor | None) -> Iterator[None]:
        self.vision.gradient_checkpointing = self.decoder.gradient_checkpointing = self.gradient_checkpointing
        features = None if images is None else self.adapter(self.vision.features(images)).flatten(0, 1)  # [N * S, D]
        embedding = self.decoder.get_submodule("embedding")
        assert isinstance(embedding, FusedEmbedding)
        with embedding.with_features(features):
            yield

    def _numbered(self, tokens: Tensor, layout: Layout, counts: Sequence[int]) -> Tensor:
        """Give each vision token its own id: `vocab_size` plus its index in the pack.

        A decoder may then embed tokens more than once and in any order, as multi-token prediction does. Only segments
        without a parent have images: completions are text.

        Args:
            tokens: Token ids `[T]`, with `image_token_id` in place of each vision token.
            layout: The segments of the pack.
            counts: Number of images of each segment; empty without images.

        Raises:
            ValueError: a segment has more or fewer image tokens than its images need.
        """
        size, id_ = self.config.vision.num_tokens, self.config.image_token_id
        begins = torch.tensor([parent < 0 for parent in layout.parents], dtype=torch.bool)
        marks = (tokens == id_).cpu() & begins.repeat_interleave(torch.tensor(layout.lengths))
        found = [int(part.sum()) for part in marks.split(list(layout.lengths))]
        for i, (number, images) in enumerate(zip(found, counts or [0] * len(found), strict=True)):
            if number != images * size:
                raise ValueError(
                    f"segment {i} holds {number} image tokens (id {id_}), but its {images} images need {size} each"
                )
        rows = marks.nonzero().squeeze(-1).to(tokens.device)
        return tokens.index_copy(0, rows, torch.arange(len(rows), device=tokens.device) + self.config.vocab_size)

    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """See `CausalLM.after_update`; the routers belong to the decoder."""
        return self.decoder.after_update(applied, all_reduce)


def _names(config: VLMConfig) -> dict[str, str | Form]:
    """Return the names of each part, with a prefix for the part."""
    names: dict[str, str | Form] = {"adapter": "adapter", "adapter.up": "adapter.up", "adapter.down": "adapter.down"}
    parts = [("vision", VISION, vit.HF, config.vision), ("decoder", LANGUAGE, config.language, config.text)]
    for ours, folder, hf, shape in parts:
        names |= {f"{ours}.{name}": _below(folder, row) for name, row in hf.table(shape).items()}
    return names


def _below(folder: str, row: str | Form) -> str | Form:
    if isinstance(row, str):
        return folder + row
    if isinstance(row, Experts):
        return replace(row, path=folder + row.path, fused=row.fused and folder + row.fused)
    return replace(row, path=folder + row.path)


def _copies(config: VLMConfig) -> dict[str, str]:
    return {LANGUAGE + copy: LANGUAGE + key for copy, key in config.language.copies(config.text).items()}


def _fit(config: VLMConfig, keys: Collection[str]) -> VLMConfig:
    own = {key.removeprefix(LANGUAGE) for key in keys if key.startswith(LANGUAGE)}
    return replace(config, text=config.language.fit(config.text, own))


VISION, LANGUAGE = "vision_tower.", "language_model."
"""The prefix of each part's keys on disk; the rest of a key is that of the part's own checkpoints."""

HF = HFMap(
    architecture="VisionLanguageForCausalLM",
    config=VLMConfig,
    model=VLM,
    names=_names,
    copies=_copies,
    fit=_fit,
)
