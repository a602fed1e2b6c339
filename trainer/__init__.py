"""The trainer: the loop (`loop.py`) and the packages that it needs: configuration, cluster, learner, sources, run, CLI.

It may import the library, `rollout` and `rewards`; nothing imports it.
"""
