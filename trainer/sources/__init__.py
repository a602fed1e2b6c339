"""Batch sources: a data set, or rollouts that are sampled and graded.

It may import `trainer.learner`, `trainer.cluster`, `trainer.config` and `trainer.run`.
`components.py`, `assemble.py`, `training_run.py`, `inference.py` and `cli` may import it.
"""
