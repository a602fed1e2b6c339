"""Models on disk: reading and writing the Hub's layout, finding folders, counting and comparing.

May import the models; the models do not import it.
"""
