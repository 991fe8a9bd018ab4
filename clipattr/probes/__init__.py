"""Heads on CLIP features: the linear probe and its files."""
