"""The data of a run: tasks (prompts with gold answers), supervised data sets, and the resumable streams of both.

This package may import `llmquest_rl.batch`, `types`, `options`, `loader`, `deferred` and `compat`, but no models,
algorithms or objectives.
`rollout` and `trainer` may import it.
"""
