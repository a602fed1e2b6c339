"""The learner processes, which compute gradients with Accelerate over DeepSpeed.

It may import `trainer.cluster` and `trainer.config`, the library, and `rollout.weights`.
`trainer.sources` and everything above may import it.
"""
