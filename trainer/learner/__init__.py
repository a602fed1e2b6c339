"""The processes that compute gradients: Accelerate over DeepSpeed.

May import `trainer.cluster.worker_group` and `trainer.config.schema`.
"""
