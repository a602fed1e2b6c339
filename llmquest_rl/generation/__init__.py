"""Text generation with our own models: token sampling, continuous batching, and weights packed for decoding.

This package may import `models`, `layers`, `batch` and `types`. Only `rollout` and tests import it.
"""
