"""The console script `clipattr-shards`: image shards from what a person has."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clipattr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from clipattr.build.build import Options
    from clipattr.build.sources import Source

USER_ERROR = 2
INTERRUPTED = 130
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

DESCRIPTION = """\
Build WebDataset image shards, shuffled, checked and complete.

SOURCE is one of
  photos/             a folder with one sub-folder per class, or with images alone
  images.csv          a table (.csv, .tsv, .parquet) with the columns path, label, caption
  shards/             tar shards, to split, shuffle, resize or check: a folder, a file or a
  'a-{000..099}.tar'  brace pattern
  hf:NAME             a dataset of the Hugging Face hub, or a folder that save_to_disk wrote

or, before the folder of an official download, the recipe of a known data set: waterbirds, celeba,
isic2019, isic2020, ham10000, chexpert, metashift, imagefolder; see clipattr-shards celeba --help
  clipattr-shards celeba DOWNLOAD FOLDER

FOLDER gets 000000.tar, 000001.tar, ...; index.json (checksums), classes.txt (names in the order of
the labels), failures.jsonl (what was left out, and why) and report.json. A sample is key.jpg (or
png, webp: the bytes of the source), key.cls (the number of the class), key.txt (the caption) and
key.json (all else, and the path). The same command goes on with a build that was stopped.
"""
EXAMPLES = """\
examples:
  clipattr-shards photos shards
  clipattr-shards photos shards --split train=0.9,val=0.1
  clipattr-shards imagenet/val shards/val --classes shards/train/classes.txt --resize 256
  clipattr-shards birds.csv shards --path-column file --label-column y --split-by photographer \\
      --split train=0.8,val=0.1,test=0.1
  clipattr-shards 'old/{00000..00099}.tar' new --samples-per-shard 5000 --verify
  clipattr-shards hf:uoft-cs/cifar10 shards --hf-split test

exit code: 0 when all is written, 2 when something must be decided first, with one message.
"""

RECIPES = {
    "waterbirds": "Waterbirds: label bird, cue water in the place, official splits.",
    "celeba": "CelebA: label and cue of the 40 attributes, official splits.",
    "isic2019": "ISIC 2019, training set: 8 diagnoses; images of one lesion stay together.",
    "isic2020": "ISIC 2020, training set: benign or malignant; one patient stays together.",
    "ham10000": "HAM10000: 7 diagnoses; images of one lesion stay together.",
    "chexpert": "CheXpert, and tables of its form: one finding is the label, another the cue.",
    "metashift": "MetaShift: folders such as train/cat/cat(sofa); label cat, cue sofa.",
    "imagefolder": "Class folders, and a table with a column of paths and columns of attributes.",
}
RECIPE_HELP = """\
{what}

DOWNLOAD is the unpacked download. The JSON of each sample holds label, cue, group (label x cue) and
all columns of the official table: an evaluation reads them as json:cue, json:group and so on.
Without official splits, and with --split, a hash decides, and what belongs together stays so.
"""
OWN_SPLIT = "train=0.8,val=0.1,test=0.1"


def shards() -> None:
    """Build shards: `clipattr-shards SOURCE FOLDER [options]`."""
    sys.exit(run_shards(sys.argv[1:]))


def run_shards(arguments: list[str]) -> int:
    """The exit code."""
    if arguments and arguments[0] in RECIPES:
        options = make_recipe_parser(arguments[0]).parse_args(arguments[1:])
    else:
        options = make_parser().parse_args(arguments)
    try:
        sys.stdout.write(f"{build(options)}\n")
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: the same command goes on\n")
        return INTERRUPTED
    return 0


def build(options: argparse.Namespace) -> object:
    """The report of the build that the options ask for."""
    # Late on purpose: this imports torch, and a typo must die in under a second.
    from clipattr.build.build import build_shards

    asked = make_options(options)
    source = _open_recipe(options) if options.recipe else _open_source(options)
    if options.recipe and source.splits is None and asked.split is None:
        from clipattr.build.placement import parse_split

        asked = asked._replace(split=parse_split(OWN_SPLIT))
    return build_shards(
        source,
        options.folder,
        asked,
        max_bad_fraction=options.max_bad_fraction,
        workers=options.workers,
        progress=sys.stderr.isatty(),
    )


def make_options(options: argparse.Namespace) -> "Options":
    """What to make of the source."""
    from clipattr.build.build import Options
    from clipattr.build.pictures import Pictures
    from clipattr.build.placement import Limits, parse_split

    asked = Options(
        limits=Limits(options.samples_per_shard, parse_bytes(options.bytes_per_shard)),
        pictures=Pictures(options.resize, options.encode, options.verify),
        split=parse_split(options.split) if options.split else None,
        shuffle=options.shuffle,
        seed=options.seed,
    )
    asked.check()
    return asked


def _open_recipe(options: argparse.Namespace) -> "Source":
    from clipattr.build.recipes import Asked, Attributes, open_recipe

    given = vars(options)
    attributes = Attributes(
        given.get("table"),
        given.get("path_column") or "path",
        split=given.get("split_column"),
        together=given.get("split_by"),
    )
    asked = Asked(
        given.get("label_column"),
        given.get("cue_column"),
        given.get("uncertain", "ignore"),
        given.get("view", "frontal"),
        attributes,
    )
    return open_recipe(options.recipe, Path(options.source), asked).source()


def _open_source(options: argparse.Namespace) -> "Source":
    from clipattr.build.open_source import Naming, open_source

    if options.split_by and not options.split:
        raise ConfigError("--split-by says what stays together in a --split, which is not given")
    if options.split_column and options.split:
        raise ConfigError("--split-column names splits, and --split makes them: give one")
    classes = None
    if options.classes:
        from clipattr.clip.templates import load_class_names

        classes = load_class_names([options.classes]).names
    return open_source(
        options.source,
        Naming(
            path=options.path_column,
            label=options.label_column,
            caption=options.caption_column,
            group=options.split_by,
            split=options.split_column,
            root=options.root,
            hub_config=options.hf_config,
            hub_split=options.hf_split,
        ),
        classes=classes,
        workers=options.workers,
        progress=sys.stderr.isatty(),
    )


def parse_bytes(text: str) -> int:
    """1GB, 500MB, 64KB or a plain number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]B)?", text.strip().upper())
    if not match:
        raise ConfigError(f"--bytes-per-shard {text}: write for example 500MB or 1GB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="clipattr-shards",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to build them from")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write them")
    parser.set_defaults(recipe="")
    group = parser.add_argument_group("source")
    _add_source(group)
    _add_split_by(group)
    _add_build(parser)
    return parser


def make_recipe_parser(recipe: str) -> argparse.ArgumentParser:
    """The command line of one recipe."""
    parser = argparse.ArgumentParser(
        prog=f"clipattr-shards {recipe}",
        description=RECIPE_HELP.format(what=RECIPES[recipe]),
        epilog=f"a folder that is called so is ./{recipe}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(recipe=recipe)
    parser.add_argument("source", metavar="DOWNLOAD", help="folder of the unpacked download")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write the shards")
    group = parser.add_argument_group("data set")
    if recipe in ("celeba", "chexpert", "imagefolder"):
        what = {
            "celeba": "attribute that is the label (Blond_Hair)",
            "chexpert": "finding that is the label (Pneumothorax)",
            "imagefolder": "column of labels (default: the class folders)",
        }
        group.add_argument("--label-column", metavar="NAME", help=what[recipe])
    if recipe not in ("waterbirds", "metashift"):
        default = {"celeba": "Male", "chexpert": "Support Devices"}.get(recipe, "none")
        group.add_argument("--cue-column", metavar="NAME", help=f"column of the cue ({default})")
    if recipe == "chexpert":
        _add_chexpert(group)
    if recipe == "imagefolder":
        _add_table(group)
        _add_split_by(group)
    _add_build(parser)
    return parser


def _add_chexpert(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--uncertain",
        default="ignore",
        metavar="POLICY",
        help="what -1 of label or cue becomes: zeros, ones, or ignore: without the image (ignore)",
    )
    group.add_argument(
        "--view", default="frontal", metavar="VIEW", help="frontal, lateral or all (frontal)"
    )


def _add_table(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--table", type=Path, metavar="FILE", help="the table (default: the one in DOWNLOAD)"
    )
    group.add_argument(
        "--path-column",
        metavar="NAME",
        help="column of paths, or of names of files with or without suffix (path)",
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_shards(parser.add_argument_group("shards"))
    _add_images(parser.add_argument_group("images"))
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="how much of the source may be left out (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes for large sets (default: the cores)",
    )


def _add_source(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one a line, in the order of their numbers (default: the names "
        "that occur, sorted)",
    )
    group.add_argument(
        "--path-column", metavar="NAME", help="column of paths (path), or of images in a hub set"
    )
    group.add_argument(
        "--label-column", metavar="NAME", help="column of numbers or names of classes (label)"
    )
    group.add_argument("--caption-column", metavar="NAME", help="column of captions (caption)")
    group.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="where the paths of a table start, and what none may lead out of (its own folder)",
    )
    group.add_argument("--hf-config", metavar="NAME", help="configuration of a hub set")
    group.add_argument("--hf-split", metavar="NAME", help="split of a hub set (train)")


def _add_split_by(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--split-column", metavar="NAME", help="column that names the split of each image"
    )
    group.add_argument(
        "--split-by",
        metavar="COLUMN",
        help="samples with one value, such as one patient, stay in one part",
    )


def _add_shards(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (10000)"
    )
    group.add_argument("--bytes-per-shard", default="1GB", metavar="SIZE", help="at most (1GB)")
    group.add_argument(
        "--split",
        metavar="NAME=PART,...",
        help="write a folder for each part, such as train=0.9,val=0.1. A hash of the sample's name "
        "decides: samples that are added later leave the others where they are",
    )
    group.add_argument(
        "--no-shuffle",
        dest="shuffle",
        action="store_false",
        help="keep the order of the source; shards that are sorted by class ruin training",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (0)")


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resize",
        type=int,
        default=0,
        metavar="SIZE",
        help="make the shorter side of larger images this long; others keep their bytes",
    )
    group.add_argument(
        "--encode", default="", metavar="FORMAT", help="write all images as jpg, png or webp"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="decode every image (default: its header), to find those that cannot be",
    )
