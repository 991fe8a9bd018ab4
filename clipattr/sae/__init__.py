"""Sparse autoencoders: architecture, losses, dead latents, constraints, files."""

from clipattr.sae.files import SaeRecord, load_sae, save_sae
from clipattr.sae.topk import TopKSae

__all__ = [
    "SaeRecord",
    "TopKSae",
    "load_sae",
    "save_sae",
]
