"""Supervised data sets by name: each file has `class Config(Options)` and `load(config, context) -> SupervisedData`.

A data set may import the other files of `llmquest_rl.data`.
`trainer.config` and the other files of `data` may import it.
"""

from llmquest_rl.loader import ComponentKind

DATASETS = ComponentKind("a data set", __name__, ("load",))
