"""Mixture of experts: routers, dispatch, and what the routers did."""

from typing import NamedTuple

from torch import Tensor


class RouterLoad(NamedTuple):
    """What the routers of one forward did: sums, so that the loads of several forwards and processes add up."""

    counts: Tensor
    """Float32 [MoE layers, experts]: how often each expert was chosen."""
    entropy: Tensor
    """Float32 [MoE layers]: entropy of the router's distribution in nats, summed over tokens."""
    tokens: Tensor
    """Float32 []: tokens routed."""

    def plus(self, other: "RouterLoad | None") -> "RouterLoad":
        """The load of both together."""
        return self if other is None else RouterLoad(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Means over layers: MaxVio = largest count / mean count - 1 (Wang et al. 2024, arXiv:2408.15664, eq. 4)."""
        mean = self.counts.mean(-1)
        violation = self.counts.amax(-1) / mean - 1
        return {
            "moe/max_vio": float(violation.mean()),
            "moe/max_vio_worst": float(violation.max()),
            "moe/idle_share": float((self.counts == 0).float().mean()),
            "moe/entropy": float(self.entropy.mean() / self.tokens),
        }
