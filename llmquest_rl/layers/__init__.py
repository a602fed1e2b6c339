"""Building blocks that several architectures share exactly; each model file wires its own blocks.

The larger mechanisms are in `attention/`, `moe/` and `recurrent/`. The other files hold norms, feed-forward and linear
layers, rotary positions and the output layer. This package may import torch and `llmquest_rl.batch`, but no model.
Models, generation and the learner may import it; data, rewards and the engine interface may not.
"""
