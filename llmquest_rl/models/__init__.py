"""Architectures, one file each, and their way from and to the Hub's folder layout."""
