"""The shapes of models: checks of config.json's fields, label names, and configurations too long for a model's file.

May import the layers; imports no model and no weights.
"""
