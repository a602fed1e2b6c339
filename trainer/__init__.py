"""The trainer: the loop (`loop.py`), and the rooms that it needs: configuration, cluster, learner, sources, run, CLI.

May import the library, `rollout` and `rewards`; nothing imports it.
"""
