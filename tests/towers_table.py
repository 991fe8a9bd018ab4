"""Runs every check of the towers and writes what was found: `python -m tests.towers_table`.

Takes about ten minutes of one core and 9 GB: most towers are built with all their blocks.
"""

import gc
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import open_clip
import timm
import torch

from tests.tower_checks import TOLERANCE, Errors, check_sites, image_subject
from tests.towers import (
    EMBEDDERS,
    FAMILIES,
    FAMILY,
    NAMES,
    Level,
    build,
    distinct,
    native_size,
    native_trunk,
    vision_config,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "towers.md"

# Checked as they are, with pictures of the native size: the ones that most people use, and one of
# each kind of tower.
NATIVE = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-L-14",
    "coca_ViT-B-32",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "EVA02-B-16",
    "PE-Core-B-16",
    "MobileCLIP-B",
    "ViTamin-S",
    "vit_medium_patch16_gap_256",
)
# Not built with all blocks: more than 12 GB, or one more of 7 GB beside ViT-bigG-14.
SMALL_ONLY = (
    "ViT-e-14",
    "ViT-bigG-14-quickgelu",
    "ViT-bigG-14-CLIPA",
    "ViT-bigG-14-CLIPA-336",
    "EVA02-E-14",
    "EVA02-E-14-plus",
)
DEEP = tuple(name for name in NAMES if name not in (*NATIVE, *SMALL_ONLY))

INTRODUCTION = """\
# Towers that can be cut

Written by `python -m tests.towers_table`; do not edit. Versions: open_clip {open_clip}, timm
{timm}, torch {torch}. Weights are random and chosen so that no norm, bias, layer scale or gate is
the identity; arithmetic is fp32 on a CPU.

For each name below and each site (every stream of every block, every choice of tokens) these agree
to {tolerance:.0e}, relative where numbers exceed one:

- `suffix(*prefix(images))` and `model.encode_image(images)`: column *cut*
- x and what a raw hook on the model's own module sees
- the suffix of a changed x and the model in which a raw hook makes the same change: column *patch*
- the gradient of the embedding in x and autograd through the whole model: column *gradient*,
  relative to the steepest slope of the stream

That holds for a small copy of each tower ({small}; patch size, head
width and ratios are native; ViTamin's stem is cut short, MobileCLIP-B keeps its width), of which
`make test` checks all sites. Column *blocks* says how much of the real tower was checked beside
it, at eight sites from the first block to the last. `all 12, 224 px`: the architecture as it is.
`all 32, 2 x 4 patches`: native depth and width, a small picture. `2 of 64`: the small copy alone,
as memory and time are short. Errors are the largest of all checks.

Text towers: each that open_clip can build without Hugging Face passes the same checks in
`tests/test_towers_text.py`, in a small copy.
"""
TOWERS = """\

## {family}

| name | tower | width | blocks | tokens | cut | patch | gradient |
|---|---|---|---|---|---|---|---|
"""
EMBEDDING = """\

## Embedders

These embed images, and their embeddings serve zero-shot, probes and everything else that reads
embeddings. They have no stream of tokens: asking for a site is an error that says so.

| name | tower |
|---|---|
"""


def facts(name: str) -> str:
    """The columns that do not depend on a run."""
    size = native_size(name)
    tokens = "cls, spatial, all" if size.has_cls else "spatial, all"
    blocks = f"all {size.blocks}, 2 x 4 patches"
    if name in NATIVE:
        blocks = f"all {size.blocks}, {size.image} px"
    elif name in SMALL_ONLY:
        blocks = f"2 of {size.blocks}, 2 x 4 patches"
    return f"| {name} | {size.kind} | {size.width} | {blocks} | {tokens} |"


def embedder_row(name: str) -> str:
    timm_name = vision_config(name).get("timm_model_name")
    kind = "open_clip ModifiedResNet"
    if timm_name is not None:
        kind = f"timm {type(native_trunk(timm_name)).__name__}"
    return f"| {name} | {kind} |"


def document(errors: Mapping[str, Errors]) -> str:
    text = INTRODUCTION.format(
        open_clip=open_clip.__version__,
        timm=timm.__version__,
        torch=torch.__version__.split("+")[0],
        tolerance=TOLERANCE,
        small=Level.SMALL.value,
    )
    for family, names in FAMILIES.items():
        text += TOWERS.format(family=family)
        for name in names:
            found = errors[name]
            text += f"{facts(name)} {found.model:.0e} | {found.patch:.0e} | "
            text += f"{found.gradient:.0e} |\n"
    return text + EMBEDDING + "".join(f"{embedder_row(name)}\n" for name in EMBEDDERS)


def check(name: str, level: Level) -> Errors:
    """All sites of a small tower, few of a whole one."""
    small = level is Level.SMALL
    subject = image_subject(build(name, level), rows=2 if small else 1)
    return check_sites(subject, subject.sites() if small else subject.few_sites())


def main() -> None:
    logging.disable(logging.WARNING)
    errors = dict.fromkeys(FAMILY, Errors())
    plan = [(Level.SMALL, NAMES), (Level.DEEP, DEEP), (Level.NATIVE, NATIVE)]
    for level, names in plan:
        for first, same in distinct(names, level).items():
            found = check(first, level)
            sys.stderr.write(f"{level.name.lower()} {', '.join(same)}: {found}\n")
            for name in same:
                errors[name] = errors[name].worst(found)
            gc.collect()
    DOCUMENT.write_text(document(errors), encoding="utf-8")


if __name__ == "__main__":
    main()
