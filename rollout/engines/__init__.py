"""The engines: each file has `class Config(Options)` and the functions `build` and `check` of `rollout/engine.py`.

They may import the other files of `rollout`. vLLM is imported in `vllm.py` only.
Nothing imports it: the loader finds an engine by its name.
"""
