"""Building blocks that several architectures share exactly; each model file wires its own blocks.

`attention/`, `moe/` and `recurrent/` hold the larger mechanisms, the files beside them norms, linear layers, rotary
positions and the output layer. This package imports `llmquest_rl.batch` and torch, never a model.
"""
