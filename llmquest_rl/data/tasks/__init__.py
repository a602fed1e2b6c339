"""Tasks by name: each file has `class Config(Options)` and `load(config, seed, malformed) -> Task`."""
