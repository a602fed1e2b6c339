"""Building blocks that several architectures share exactly; wiring stays in the model files."""
