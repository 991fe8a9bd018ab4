"""Evaluation as Lightning callbacks: each takes the readouts and does its own science.

States are torchmetrics, so the ranks of a distributed run merge exactly.
"""

from clipattr.callbacks.examples import ExamplesCallback
from clipattr.callbacks.faithfulness import FaithfulnessCallback
from clipattr.callbacks.global_deletion import GlobalDeletionCallback
from clipattr.callbacks.heads import HeadsCallback
from clipattr.callbacks.reconstruction import ReconstructionCallback
from clipattr.callbacks.reliance import RelianceCallback
from clipattr.callbacks.sae_evaluation import SaeEvaluation, mean_by_type

__all__ = [
    "ExamplesCallback",
    "FaithfulnessCallback",
    "GlobalDeletionCallback",
    "HeadsCallback",
    "ReconstructionCallback",
    "RelianceCallback",
    "SaeEvaluation",
    "mean_by_type",
]
