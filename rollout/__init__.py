"""Rollouts: the interface of engines, the engines, and the worker that the cluster places around one of them.

It may import the library, but neither `rewards` nor `trainer`. Engines are found by name: see `rollout/engine.py`.
Only `trainer` imports it.
"""

from llmquest_rl.loader import ComponentKind

ENGINES = ComponentKind("an engine", "rollout.engines", ("build", "check"), can_be_function=False)
