"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1): an image is a sequence of patches.

Patches are projected (eq. 1), a class token is put before them, and learned positions are added. In the pre-norm blocks
(eqs. 2, 3) every token attends to every other. A linear classifier reads the class token (eq. 4).
Shapes: B images, P patches, S = 1 + P tokens of an image, D hidden size, H heads, C = D / H head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquest_rl.batch import TokenBatch
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.mlp import MLP, check_activation
from llmquest_rl.models.base import ClassifierModel, Scores
from llmquest_rl.models.config.checks import check_sizes, check_supported
from llmquest_rl.models.config.labels import label_fields, read_labels
from llmquest_rl.models.weight_map import HFMap
from llmquest_rl.types import ImageFormat

SUPPORTED_VALUES: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Fields of config.json for which one value is implemented; a missing field has it."""


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a Vision Transformer."""

    image_size: tuple[int, int]
    """Height and width of all images, in pixels."""
    patch_size: tuple[int, int]
    """Height and width of a patch, in pixels."""
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    labels: tuple[str, ...]
    """Names of the classes; empty = no classifier, as in the vision tower of a larger model."""
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        check_sizes(
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
        )
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_heads}"
            )
        check_activation(self.hidden_act, "hidden_act")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image: its patches and the class token."""
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return 1 + (height // rows) * (width // columns)

    @property
    def image_format(self) -> ImageFormat:
        """The format of the images. The model has no vocabulary, so token 0 is the placeholder of image tokens."""
        return ImageFormat(0, self.num_tokens, self.num_channels, *self.image_size)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5. Missing fields have the values of ViT-Base, as in transformers.

        Raises:
            ValueError: a value is not implemented, or fields contradict each other; the message names them.
        """
        check_supported(values, SUPPORTED_VALUES, "ViT")
        return cls(
            image_size=_height_and_width("image_size", values.get("image_size", 224)),
            patch_size=_height_and_width("patch_size", values.get("patch_size", 16)),
            num_channels=values.get("num_channels", 3),
            hidden_size=values.get("hidden_size", 768),
            intermediate_size=values.get("intermediate_size", 3072),
            num_layers=values.get("num_hidden_layers", 12),
            num_heads=values.get("num_attention_heads", 12),
            labels=read_labels(values),
            hidden_act=values.get("hidden_act", "gelu"),
            layer_norm_eps=values.get("layer_norm_eps", 1e-12),
            qkv_bias=values.get("qkv_bias", True),
            initializer_range=values.get("initializer_range", 0.02),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 reads."""
        return {
            "architectures": [HF.architecture],
            "model_type": "vit",
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
            "num_channels": self.num_channels,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            **label_fields(self.labels),
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
            "qkv_bias": self.qkv_bias,
            "initializer_range": self.initializer_range,
            **SUPPORTED_VALUES,
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: 4 patches of 8 x 8 pixels."""
        return cls(
            image_size=(16, 16),
            patch_size=(8, 8),
            num_channels=3,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            labels=tuple(f"LABEL_{i}" for i in range(10)),
        )


def _height_and_width(field: str, value: Any) -> tuple[int, int]:
    """Return the height and width of a field; one number describes a square."""
    sizes = [value, value] if isinstance(value, int) else list(value)
    if len(sizes) != 2:
        raise ValueError(f"config.json has {field} {value!r}: expected one number, or height and width")
    for size in sizes:
        check_sizes(**{field: size})
    return sizes[0], sizes[1]


class Attention(nn.Module):
    """Multi-head attention without a mask among the tokens of an image (appendix A, eqs. 5 to 8)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_heads
        self.query = Linear(size, size, bias=config.qkv_bias)
        self.key = Linear(size, size, bias=config.qkv_bias)
        self.value = Linear(size, size, bias=config.qkv_bias)
        self.output = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, S, D]` to the same shape."""
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # [B, H, S, C]
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before and a residual around it (eqs. 2 and 3)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, S, D]` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ViT(ClassifierModel):
    """The Vision Transformer. It computes the tokens of the images; those in the batch are placeholders."""

    new_head = "classifier"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens, size))
        # The kernel equals the stride, so this is one linear layer over the pixels of each patch.
        self.patches = nn.Conv2d(config.num_channels, size, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.classifier = Linear(size, len(config.labels)) if config.labels else nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Compute the features of images.

        Args:
            images: Pixels `[B, channels, height, width]`, normalised as the checkpoint requires.

        Returns:
            Features `[B, S, D]` after the last norm: the class token first, then the patches row by row.

        Raises:
            ValueError: the images have another size than the model.
        """
        expected = (self.config.num_channels, *self.config.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {list(images.shape)}, but this ViT takes [images, {', '.join(map(str, expected))}] "
                "(channels, height, width): resize or crop them first"
            )
        x = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)  # [B, P, D]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.position_embeddings  # [B, S, D]
        for block in self.blocks:
            x = self.run_block(block, x)
        out: Tensor = self.norm(x)
        return out

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits `[B, labels]` of images `[B, channels, height, width]`; see `features`."""
        out: Tensor = self.classifier(self.features(images)[:, 0])
        return out

    def forward(self, batch: TokenBatch) -> Scores:
        """Return the logits of the batch's images, in their order; see `ClassifierModel.forward`.

        Raises:
            ValueError: the batch does not have one image for each target, or images have another size than the model.
        """
        found = 0 if batch.images is None else len(batch.images)
        if batch.images is None or found != len(batch.targets):
            raise ValueError(
                f"a ViT needs one image for each label, but the batch has {found} images and "
                f"{len(batch.targets)} labels"
            )
        return Scores(self.logits(batch.images).float(), {})

    @torch.no_grad()
    def init_head(self, generator: torch.Generator) -> None:
        """Set the classifier to 0, as the paper does for new labels (section 3.2)."""
        for parameter in self.classifier.parameters():
            parameter.zero_()


HF = HFMap(
    architecture="ViTForImageClassification",
    config=ViTConfig,
    model=ViT,
    names={
        "cls_token": "vit.embeddings",
        "position_embeddings": "vit.embeddings",
        "patches": "vit.embeddings.patch_embeddings.projection",
        "blocks.{i}.attention_norm": "vit.encoder.layer.{i}.layernorm_before",
        "blocks.{i}.attention.query": "vit.encoder.layer.{i}.attention.attention.query",
        "blocks.{i}.attention.key": "vit.encoder.layer.{i}.attention.attention.key",
        "blocks.{i}.attention.value": "vit.encoder.layer.{i}.attention.attention.value",
        "blocks.{i}.attention.output": "vit.encoder.layer.{i}.attention.output.dense",
        "blocks.{i}.mlp_norm": "vit.encoder.layer.{i}.layernorm_after",
        "blocks.{i}.mlp.up": "vit.encoder.layer.{i}.intermediate.dense",
        "blocks.{i}.mlp.down": "vit.encoder.layer.{i}.output.dense",
        "norm": "vit.layernorm",
        "classifier": "classifier",
    },
)
