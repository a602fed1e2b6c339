"""Where batches come from: a data set, or completions that are sampled and graded.

May import `trainer.learner.learner`, `trainer.cluster.worker_group`, `trainer.config.schema` and `trainer.run.folder`.
"""
