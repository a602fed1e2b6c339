"""The library: models, algorithms, objectives and data in plain PyTorch; no Ray, vLLM or DeepSpeed."""
