"""Heads on features, how they are fitted, and their files."""

from clipattr.probes.estimator import LogisticProbe, Validation
from clipattr.probes.files import Head, ProbeRecord, load_head, load_probe, save_probe
from clipattr.probes.grid import GridScores, ProbeGrid
from clipattr.probes.heads import AttentionProbe, MlpProbe, absorb
from clipattr.probes.linear import LinearProbe
from clipattr.probes.logistic import Solution, solve_path
from clipattr.probes.losses import head_losses
from clipattr.probes.robust import METHODS, Fitted, GroupRows, Trial, fit_groups
from clipattr.probes.sparse import SparseProbe, SparseSolution, solve_sparse_path
from clipattr.probes.text import interpolate, interpolation_scores, text_probe

__all__ = [
    "METHODS",
    "AttentionProbe",
    "Fitted",
    "GridScores",
    "GroupRows",
    "Head",
    "LinearProbe",
    "LogisticProbe",
    "MlpProbe",
    "ProbeGrid",
    "ProbeRecord",
    "Solution",
    "SparseProbe",
    "SparseSolution",
    "Trial",
    "Validation",
    "absorb",
    "fit_groups",
    "head_losses",
    "interpolate",
    "interpolation_scores",
    "load_head",
    "load_probe",
    "save_probe",
    "solve_path",
    "solve_sparse_path",
    "text_probe",
]
