"""The base classes of all models and of decoder-only language models, and the results of their forward passes."""

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
from llmquest_rl.soft_targets import TeacherHead
from llmquest_rl.types import ImageFormat


class Hidden(NamedTuple):
    """The final hidden states of a forward pass, with the losses and loads of its routers."""

    states: Tensor
    """`[tokens, hidden_size]`, after the last norm."""
    aux: dict[str, Tensor]
    """Scalar losses of the model itself by name, such as a router's balance loss: means over tokens, already multiplied
    by their coefficients. Empty for dense models."""
    loads: RouterLoad | None = None
    """The choices of the routers; None for models without routers and outside of training."""


class Output(NamedTuple):
    """Log-probs and entropies of a batch's targets."""

    logprobs: Tensor
    """Float32 `[targets]`, in nats."""
    entropy: Tensor | None
    """Float32 `[targets]`, in nats; None unless the caller asked for it."""
    aux: dict[str, Tensor]
    """See `Hidden.aux`."""
    teacher_kl: Tensor | None = None
    """KL(teacher || model), float32 `[targets]`, in nats; None unless the batch has soft targets."""


class Scores(NamedTuple):
    """The logits of a classifier, or the rewards of a reward model."""

    values: Tensor
    """Float32 `[targets, labels]`, read at the source of each target, usually the last token of the text."""
    aux: dict[str, Tensor]
    """See `Hidden.aux`."""


class ModelConfig(Protocol):
    """The shape of a model: the fields of config.json under our names."""

    @property
    def initializer_range(self) -> float: ...

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a config.json.

        Raises:
            ValueError: a required field is missing, a value is not implemented, or the shape is impossible.
        """
        ...

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that describes this shape."""
        ...

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape small enough for tests."""
        ...


class DecoderWrapperConfig:
    """The properties that a configuration takes over from the decoder's configuration inside it."""

    text: Any
    """The decoder's configuration."""

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
    """Return the format of the images that a model of this configuration reads; None = it reads text only."""
    found: ImageFormat | None = getattr(config, "image_format", None)
    return found


def reads_text(config: Any) -> bool:
    """Return whether a model of this configuration has a vocabulary."""
    return hasattr(config, "vocab_size")


class Model(nn.Module):
    """A network whose parameters and buffers are the weights of a checkpoint."""

    float32: ClassVar[tuple[str, ...]] = ()
    """Shell patterns of the weights that stay float32 in a model of any dtype."""

    blocks: nn.ModuleList

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Whether only the input of each block is kept for the backward pass and the rest is computed again: this takes
        less memory and a third more time."""

    def stays_float32(self, name: str) -> bool:
        """Return whether a weight is float32 in a model of any dtype."""
        return any(fnmatch(name, pattern) for pattern in self.float32)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Call one block, with gradient checkpointing if it is switched on and a gradient will be computed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @property
    def shares_prompts(self) -> bool:
        """Whether the model can compute a prompt once for all its completions."""
        return True

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of config.json that differ from the folder that the model was made from."""
        return {}

    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """Finish an optimizer update; see `CausalLM.after_update`."""
        return {}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights that training from scratch starts with: matrices are normal with standard deviation
        `initializer_range`, biases are 0, norms are 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, self.config.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in self.buffers():
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep float32 buffers in float32 when the whole model is cast: DeepSpeed casts every buffer."""
        kept = {name: buffer for name, buffer in self.named_buffers() if self.stays_float32(name)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            module, _, ending = name.rpartition(".")
            owner = self.get_submodule(module)
            owner._buffers[ending] = buffer.to(owner.get_buffer(ending).device)
        return self


class ClassifierModel(Model):
    """A network with one number for each label: a classifier of texts or images, or a reward model with one label.

    The text ends at the source of a target; the target itself is the index of the true label, or 0 if it has none. The
    configuration has the field `labels`, the names of the labels.
    """

    new_head: ClassVar[str]
    """The name of the output layer, which is made anew for other labels."""

    @property
    def config_fields(self) -> dict[str, Any]:
        """See `Model.config_fields`: labels, pooling, and the architecture, since the source may be a decoder."""
        fields = self.config.to_hf()
        names = ("architectures", "num_labels", "id2label", "label2id", "score_pooling")
        return {name: fields[name] for name in names if name in fields}

    def init_head(self, generator: torch.Generator) -> None:
        """Draw the weights of the output layer for labels that the checkpoint was not trained on."""
        raise NotImplementedError

    def forward(self, batch: TokenBatch) -> Scores:
        """Return the scores of a batch's targets."""
        raise NotImplementedError


class CausalLM(Model):
    """A decoder-only language model. A subclass creates `embedding`, `blocks` and `head`, and implements `hidden`."""

    head: LMHead

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._load: RouterLoad | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a forward pass now belongs to an update: the model is in training mode and gradients are on."""
        return self.training and torch.is_grad_enabled()

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """Compute the final hidden states of packed tokens.

        Args:
            tokens: Token ids `[tokens]`.
            positions: Position ids `[tokens]`.
            context: Decides which tokens attend to which, and holds the cache.
        """
        raise NotImplementedError

    def with_targets(self, hidden: Hidden, batch: TokenBatch) -> Hidden:
        """Add the losses that need the next tokens, such as multi-token prediction; the states do not change."""
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits `[n, vocab]` of hidden states `[n, hidden_size]`."""
        return self.head.logits(states)

    def forward(self, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False) -> Output:
        """Compute the log-probs of the batch's targets, in memory that does not grow with tokens x vocabulary.

        Args:
            batch: Packed sequences with their targets.
            temperature: The logits are divided by it.
            entropy: Also compute the entropy of the distribution at each target.

        Raises:
            ValueError: the batch has images; a text model would ignore them.
        """
        if batch.images is not None:
            raise ValueError(f"the batch has images, but {type(self).__name__} reads text only")
        context = PackedAttention(batch.layout, batch.tokens.device)
        states, aux, loads = self.with_targets(self.hidden(batch.tokens, batch.positions, context), batch)
        self.record_router_load(loads, batch)
        inputs = (states.index_select(0, batch.sources), batch.targets, temperature, entropy)
        if batch.soft_targets is not None:
            logprobs, teacher_kl = self.head(*inputs, batch.soft_targets)
            return Output(logprobs, None, aux, teacher_kl)
        logprobs, entropies = self.head(*inputs)
        return Output(logprobs, entropies, aux)

    @torch.no_grad()
    def distributions(self, batch: TokenBatch) -> TeacherHead:
        """Return the next-token distributions at the batch's targets, for a student."""
        hidden = self.hidden(batch.tokens, batch.positions, PackedAttention(batch.layout, batch.tokens.device))
        return TeacherHead(hidden.states.index_select(0, batch.sources), self.head.weight.detach(), self.head.softcap)

    def record_router_load(self, loads: RouterLoad | None, batch: TokenBatch) -> None:
        """Add the routers' choices of a training batch to those of the current update.

        Nothing is added in eval mode, without gradients, and for batches in which all weights are 0: these only keep
        the processes in step."""
        if loads is None or not self.is_trained:
            return
        weights = batch.token_fields.get("weights")
        counted = 1.0 if weights is None else (weights != 0).any().float()
        self._load = RouterLoad(*(part.detach() * counted for part in loads)).plus(self._load)

    @torch.no_grad()
    def after_update(self, applied: bool, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """Finish an optimizer update: compute router metrics, and call `balance` for models that correct their routers.

        Args:
            applied: False if the update was skipped: then nothing is corrected.
            all_reduce: Sums a tensor over all processes, in place. Models with routers call it, so all processes must
                call this method together.

        Returns:
            The metrics of the whole update, equal on every process; empty for models without routers.
        """
        load, self._load = self._load, None
        if load is None or not applied:
            return {}
        for part in load:
            all_reduce(part)
        self.balance(load.counts)
        return load.metrics()

    def balance(self, counts: Tensor) -> None:
        """Correct the routers after an update.

        Args:
            counts: How often each expert was chosen, `[MoE layers, experts]`.
        """
