"""The data of a run: tasks (prompts with gold answers), supervised data sets, and the resumable streams of both.

May import `llmquest_rl.batch`, `types`, `options`, `loader` and `compat`; no models, algorithms or objectives.
"""
