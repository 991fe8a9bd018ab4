"""Evaluation as Lightning callbacks: each takes the readouts and does its own science.

States are torchmetrics, so the ranks of a distributed run merge exactly.
"""

from clipattr.callbacks.base import take_all
from clipattr.callbacks.class_reliance import ClassReliance
from clipattr.callbacks.examples import ExamplesCallback
from clipattr.callbacks.faithfulness import FaithfulnessCallback
from clipattr.callbacks.global_deletion import GlobalDeletionCallback
from clipattr.callbacks.latents import LatentsCallback
from clipattr.callbacks.reconstruction import ReconstructionCallback
from clipattr.callbacks.reliance import RelianceCallback
from clipattr.callbacks.sae_evaluation import SaeEvaluation, mean_by_type
from clipattr.callbacks.shortcuts import LinearHead, ShortcutCallback
from clipattr.callbacks.shuffled import ShuffledNames, ShuffledReliance
from clipattr.callbacks.training_faithfulness import (
    HeldOut,
    TrainingFaithfulness,
    measure_faithfulness,
)

__all__ = [
    "ClassReliance",
    "ExamplesCallback",
    "FaithfulnessCallback",
    "GlobalDeletionCallback",
    "HeldOut",
    "LatentsCallback",
    "LinearHead",
    "ReconstructionCallback",
    "RelianceCallback",
    "SaeEvaluation",
    "ShortcutCallback",
    "ShuffledNames",
    "ShuffledReliance",
    "TrainingFaithfulness",
    "mean_by_type",
    "measure_faithfulness",
    "take_all",
]
