"""Lightning modules, datamodules and the trainer: thin glue around the science packages."""

from clipattr.training.fit_rows import fit_sae

__all__ = ["fit_sae"]
