"""Tasks by name: each file has `class Config(Options)` and `load(config, seed, malformed) -> Task`.

A task may import the other files of `llmquest_rl.data`, and a task that it builds on, as `gsm8k` builds on `table`.
`trainer.config` and the other files of `data` may import it.
"""

from llmquest_rl.loader import ComponentKind

TASKS = ComponentKind("a task", __name__, ("load",))
