"""Policy-gradient algorithms as rows of independent cells: one function for each cell, a table of presets.

from llmquest_rl.algorithms.presets import resolve
algorithm = resolve("grpo", {"beta": 0.0})
"""
