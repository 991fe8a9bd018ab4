"""Recipes: official downloads of known data sets as sources, with labels, cues and splits."""

from pathlib import Path
from typing import NamedTuple

from clipattr.build.recipes.birds import read_waterbirds
from clipattr.build.recipes.chest import read_chexpert
from clipattr.build.recipes.faces import read_celeba
from clipattr.build.recipes.folders import Attributes, read_image_folder, read_metashift
from clipattr.build.recipes.listing import Official
from clipattr.build.recipes.skin import read_ham10000, read_isic2019, read_isic2020

__all__ = ["Attributes", "Asked", "Official", "open_recipe"]


class Asked(NamedTuple):
    """What a user asks of a recipe; None: its default.

    Attributes:
        label: the column of the label, of celeba, chexpert and imagefolder.
        cue: the column of the cue, of all but waterbirds and metashift.
        uncertain: zeros, ones or ignore, of chexpert.
        view: frontal, lateral or all, of chexpert.
        attributes: how to read the table of imagefolder; its label and cue are the ones above.
    """

    label: str | None = None
    cue: str | None = None
    uncertain: str = "ignore"
    view: str = "frontal"
    attributes: Attributes = Attributes()


def open_recipe(name: str, folder: Path, asked: Asked = Asked()) -> Official:  # noqa: B008
    """Read the download in a folder, without its images."""
    match name:
        case "waterbirds":
            return read_waterbirds(folder)
        case "celeba":
            return read_celeba(folder, asked.label or "Blond_Hair", asked.cue or "Male")
        case "isic2019":
            return read_isic2019(folder, asked.cue)
        case "isic2020":
            return read_isic2020(folder, asked.cue)
        case "ham10000":
            return read_ham10000(folder, asked.cue)
        case "chexpert":
            return read_chexpert(
                folder,
                asked.label or "Pneumothorax",
                asked.cue or "Support Devices",
                uncertain=asked.uncertain,
                view=asked.view,
            )
        case "metashift":
            return read_metashift(folder)
        case "imagefolder":
            attributes = asked.attributes._replace(label=asked.label, cue=asked.cue)
            return read_image_folder(folder, attributes)
        case _:
            raise AssertionError(f"no recipe {name!r}")
