"""Rollout engines by name: each file has `class Config(Options)` and the functions `build` and `check`.

See `rollout/engine.py` for what they take and return.
"""

from llmquest_rl.loader import ComponentKind

ENGINES = ComponentKind("an engine", __name__, ("build", "check"), can_be_function=False)
