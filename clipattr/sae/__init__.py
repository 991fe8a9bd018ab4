"""Sparse autoencoders: architecture, losses, dead latents, constraints, files."""
