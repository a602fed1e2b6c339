"""Rewards: functions that score a completion, and the grader that runs them in worker processes with limits.

It may import `types`, `options`, `loader` and `compat` of `llmquest_rl`, but neither torch nor Ray.
The trainer imports it.
"""
