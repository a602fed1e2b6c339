"""Tasks by name: each file has `class Config(Options)` and `load(config, seed, malformed) -> Task`.

A task may import the other files of `llmquest_rl.data`, and a task that it builds on, as `gsm8k` builds on `table`.
"""

from llmquest_rl.loader import ComponentKind

TASKS = ComponentKind("a task", __name__, ("load",))
