"""The built-in rewards: the reward `foo` is the function `reward` of `foo.py`, its options are the class `Config`.

May import `rewards.extract`, `rewards.types` and `llmquest_rl.options`; no torch.
"""
