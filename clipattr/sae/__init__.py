"""Sparse autoencoders: architectures, losses, dead latents, constraints, files."""

from clipattr.sae.files import SaeRecord, load_sae, save_sae
from clipattr.sae.foreign import import_sae
from clipattr.sae.hub import pull_sae, push_sae
from clipattr.sae.prefixes import MatryoshkaSae, NestedTopKSae
from clipattr.sae.relu import GatedSae, JumpReluSae, ReluSae
from clipattr.sae.topk import BatchTopKSae, TopKSae
from clipattr.sae.transcoder import Transcoder

__all__ = [
    "BatchTopKSae",
    "GatedSae",
    "JumpReluSae",
    "MatryoshkaSae",
    "NestedTopKSae",
    "ReluSae",
    "SaeRecord",
    "TopKSae",
    "Transcoder",
    "import_sae",
    "load_sae",
    "pull_sae",
    "push_sae",
    "save_sae",
]
