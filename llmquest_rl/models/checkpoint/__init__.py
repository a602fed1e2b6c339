"""Models on disk: reading, writing and finding folders of the Hub's layout, counting parameters, comparing logits.

This package may import the models; the models do not import it.
"""
