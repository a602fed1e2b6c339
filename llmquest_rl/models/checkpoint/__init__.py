"""Models on disk: reading, writing and finding folders of the Hub's layout, counting parameters, comparing logits.

This package may import the models; they do not import it. `rollout` and `trainer` may.
"""
