"""Papers' curves as recipes: what `llmquest-rl reproduce` runs."""
