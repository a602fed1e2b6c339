"""The architectures, one file each: configuration, blocks, model, and the map of its weights' names on the Hub.

A file may import layers, `base`, `config`, `weight_map` and `serving`; `architectures` finds it by walking this folder.
`checkpoint` reads and writes folders of the Hub's layout.
"""
