"""Supervised data sets by name: each file has `class Config(Options)` and `load(config, context) -> SupervisedData`."""
