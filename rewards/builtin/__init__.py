"""The built-in rewards: the reward `foo` is the function `reward` of `foo.py`, and its options are the class `Config`.

They may import `rewards.extract`, and `options`, `loader` and `compat` of `llmquest_rl`; no torch.
`rewards` and `trainer.config` may import it.
"""

from llmquest_rl.loader import ComponentKind

REWARDS = ComponentKind("a reward", __name__, ("reward",))
