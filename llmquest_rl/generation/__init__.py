"""Text generation with our own models: token sampling, continuous batching, and weights packed for decoding.

May import the rest of the library that knows models (`models`, `layers`, `batch`, `types`). Of the other packages, only
`rollout` and tests import it.
"""
