"""The architectures, one file each: configuration, blocks, model, and the map of its weights' names on the Hub.

A file may import layers, batches, types, the helper files of this folder, and an architecture that it builds on;
`architectures` finds it by walking the folder. `checkpoint` reads and writes folders of the Hub's layout.
`generation`, `rollout` and `trainer` may import it; layers, algorithms, objectives and data may not.
"""
