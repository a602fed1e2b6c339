"""The built-in rewards: the reward `foo` is the function `reward` of `foo.py`, and its options are the class `Config`.

They may import `rewards.extract`, `rewards.types`, `llmquest_rl.options` and `llmquest_rl.loader`; no torch.
"""

from llmquest_rl.loader import ComponentKind

REWARDS = ComponentKind("a reward", __name__, ("reward",))
