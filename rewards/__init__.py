"""Rewards: functions that score a completion, and the grader that runs them in worker processes with limits.

May import `types`, `options`, `loader` and `compat` of `llmquest_rl`, but no torch and no Ray. The trainer imports it.
"""
