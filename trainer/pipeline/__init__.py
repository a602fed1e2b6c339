"""Pipelines: several runs, each of which may start from the models of the runs before it: `llmquest-rl pipeline`.

It may import the packages of `trainer` below it; `trainer.papers` and `trainer.cli` import it.
"""
