"""The shapes of models: checks of config.json's fields, label names, and configurations too long for a model's file.

This package may import the layers, but no model, and not `weight_map`.
Only the models import it.
"""
