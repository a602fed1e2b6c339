"""llmquest_rl: the library room. Models, algorithms, objectives and data in plain PyTorch; no Ray, vLLM or DeepSpeed."""
