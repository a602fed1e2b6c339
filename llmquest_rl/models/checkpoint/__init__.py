"""Models on disk: reading, writing and finding folders of the Hub's layout, counting parameters, comparing logits.

May import the models; the models do not import it.
"""
