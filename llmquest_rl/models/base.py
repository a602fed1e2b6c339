"""What every model here has in common, and what every decoder-only language model has."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmquest_rl.batch import TokenBatch
from llmquest_rl.layers.attention.attention import AttentionContext, PackedAttention
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.moe.moe import RouterLoad
from llmquest_rl.types import ImageFormat


class Hidden(NamedTuple):
    """Final hidden states, and what else a forward leaves behind."""

    states: Tensor
    """[tokens, size], after the last norm."""
    aux: dict[str, Tensor]
    """Scalar losses by name, means over tokens, already scaled (a router's balance loss); empty for dense models."""
    loads: RouterLoad | None = None
    """What the routers did; None for models without."""


class Output(NamedTuple):
    """What training needs to know about a batch's targets."""

    logprobs: Tensor
    """Float32 [targets]."""
    entropy: Tensor | None
    """Float32 [targets] in nats; None unless asked for."""
    aux: dict[str, Tensor]
    """As `Hidden.aux`."""


class Scores(NamedTuple):
    """What a classifier or a reward model says about a batch."""

    values: Tensor
    """Float32 [targets, labels]: read at each target's source, the last token of what is judged."""
    aux: dict[str, Tensor]
    """As `Hidden.aux`."""


class ModelConfig(Protocol):
    """An architecture's shape."""

    @property
    def initializer_range(self) -> float: ...

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a config.json."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that gives this shape."""
        ...

    @classmethod
    def tiny(cls) -> Self:
        """A shape small enough for tests."""
        ...


class AroundDecoder:
    """What a config that holds a decoder's has of it."""

    text: Any
    """The decoder's config."""

    @property
    def vocab_size(self) -> int:
        return int(self.text.vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.text.num_layers)

    @property
    def max_positions(self) -> int:
        return int(self.text.max_positions)

    @property
    def initializer_range(self) -> float:
        return float(self.text.initializer_range)


def image_format(config: Any) -> ImageFormat | None:
    """How the model of a config wants its images; None = it reads text only."""
    found: ImageFormat | None = getattr(config, "image_format", None)
    return found


def reads_text(config: Any) -> bool:
    """Whether the model of a config has a vocabulary."""
    return hasattr(config, "vocab_size")


class Model(nn.Module):
    """A network whose parameters and buffers are the weights of a checkpoint."""

    float32: ClassVar[tuple[str, ...]] = ()
    """Shell patterns of weights that stay float32 whatever the model's dtype."""

    blocks: nn.ModuleList

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Keep only each block's input and compute the rest again in backward: less memory, a third more time."""

    def stays_float32(self, name: str) -> bool:
        """Whether a weight ignores the model's dtype."""
        return any(fnmatch(name, pattern) for pattern in self.float32)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Call one block, through gradient checkpointing where that is on and there is a gradient to compute."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt can be computed once for all its completions."""
        return True

    @property
    def config_fields(self) -> dict[str, Any]:
        """What config.json must say of this model whatever it says in the folder that the model was made from."""
        return {}

    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """What follows an optimizer update; see `CausalLM.after_update`."""
        return {}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights as the family starts from: matrices normal with `initializer_range`, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, self.config.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in self.buffers():
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast of the whole model (DeepSpeed casts without asking) leaves what stays float32 alone."""
        kept = {name: buffer for name, buffer in self.named_buffers() if self.stays_float32(name)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            module, _, ending = name.rpartition(".")
            owner = self.get_submodule(module)
            owner._buffers[ending] = buffer.to(owner.get_buffer(ending).device)
        return self


class ClassifierModel(Model):
    """A network with a number for each label: a classifier of texts or images, or a reward model with one label.

    What is judged ends at a target's source; the target itself is the label's number, or 0 where there is none.
    The config has `labels`, their names.
    """

    new_head: ClassVar[str]
    """The module that other labels need a new one of."""

    @property
    def config_fields(self) -> dict[str, Any]:
        """See `Model.config_fields`: the architecture, which may be a decoder's in the source, and the labels."""
        fields = self.config.to_hf()
        return {name: fields[name] for name in ("architectures", "num_labels", "id2label", "label2id")}

    def init_head(self, generator: torch.Generator) -> None:
        """Draw the weights of `new_head`, for labels that the rest was not trained on."""
        raise NotImplementedError

    def forward(self, batch: TokenBatch) -> Scores:
        """The scores of a batch's targets."""
        raise NotImplementedError


class CausalLM(Model):
    """A decoder. A subclass makes `embedding`, `blocks` and `head`, and implements `hidden`."""

    head: LMHead

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._load: RouterLoad | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a forward now is part of an update: not in eval, and not without a gradient."""
        return self.training and torch.is_grad_enabled()

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """Final hidden states of `tokens` [tokens] at `positions` [tokens], which see what `context` lets them see."""
        raise NotImplementedError

    def with_targets(self, hidden: Hidden, batch: TokenBatch) -> Hidden:
        """What else a model computes where the next tokens are known; the states stay as they are."""
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocab] of hidden `states` [n, size]."""
        return self.head.logits(states)

    def forward(self, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False) -> Output:
        """Log-probs of the batch's targets, in memory that does not grow with tokens x vocabulary.

        Raises:
            ValueError: the batch has images, which a text model would leave out.
        """
        if batch.images is not None:
            raise ValueError(f"the batch has images, but {type(self).__name__} reads text only")
        context = PackedAttention(batch.layout, batch.tokens.device)
        states, aux, loads = self.with_targets(self.hidden(batch.tokens, batch.positions, context), batch)
        self.count(loads, batch)
        logprobs, entropies = self.head(states.index_select(0, batch.sources), batch.targets, temperature, entropy)
        return Output(logprobs, entropies, aux)

    def count(self, loads: RouterLoad | None, batch: TokenBatch) -> None:
        """Remember what the routers did for a batch that is trained on: not in eval, not without a gradient, and not
        for the batches without weight that only keep processes in step."""
        if loads is None or not self.is_trained:
            return
        weights = batch.token_fields.get("weights")
        counted = 1.0 if weights is None else (weights != 0).any().float()
        self._load = RouterLoad(*(part.detach() * counted for part in loads)).plus(self._load)

    @torch.no_grad()
    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """What follows an optimizer update: router metrics, and `balance` for models that correct their routers.

        Args:
            applied: False where the update was skipped: then nothing is corrected.
            all_reduce: Sums a tensor over all processes, in place. A collective call for models with routers.

        Returns:
            Metrics of the whole update, the same on every process; empty for models without routers.
        """
        load, self._load = self._load, None
        if load is None or not applied:
            return {}
        for part in load:
            all_reduce(part)
        self.balance(load.counts)
        return load.metrics()

    def balance(self, counts: Tensor) -> None:
        """Correct the routers after an update in which experts were chosen `counts` [MoE layers, experts] times."""
