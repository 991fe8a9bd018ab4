"""Heads on features, and their files."""

from clipattr.probes.files import ProbeRecord, load_probe, save_probe
from clipattr.probes.linear import LinearProbe

__all__ = [
    "LinearProbe",
    "ProbeRecord",
    "load_probe",
    "save_probe",
]
