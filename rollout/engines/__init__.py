"""One file for each engine; an engine's name is its file's name."""
