"""The library: models, algorithms, objectives and data in plain PyTorch, without Ray, vLLM or DeepSpeed.

It imports none of `rollout`, `rewards` and `trainer`; all of them may import it.
"""
