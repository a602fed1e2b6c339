"""The trainer: the loop (`loop.py`), and its packages: configuration, cluster, learner, sources, run, CLI.

May import the library, `rollout` and `rewards`; nothing imports it.
"""
