"""Tasks by name: each file has `class Config(Options)` and `load(config, seed, malformed) -> Task`.

May import the other files of `llmquest_rl.data`, but no other task, except to build on it as `gsm8k` builds on `table`.
"""

from llmquest_rl.loader import ComponentKind

TASKS = ComponentKind("a task", __name__, ("load",))
