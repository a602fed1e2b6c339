"""Batch sources: a data set, or rollouts that are sampled and graded.

May import `trainer.learner`, `trainer.cluster`, `trainer.config` and `trainer.run`.
"""
