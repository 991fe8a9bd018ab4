"""From what a person names to a source: a folder, a table, shards, or a set of the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipattr.build.manifest import PATH, TABLE_SUFFIXES, choose_columns, read_table
from clipattr.build.source_folder import read_folder
from clipattr.build.source_hub import load_hub, read_hub
from clipattr.build.source_manifest import read_listed
from clipattr.build.source_tars import read_tars
from clipattr.build.sources import Source
from clipattr.data.shards import find_shards
from clipattr.errors import ConfigError

HUB = "hf:"


class Naming(NamedTuple):
    """How to read the source; each field belongs to some kinds of source only.

    Attributes:
        path: the column of paths in a manifest, of images in a hub set.
        label: the column of labels.
        caption: the column of captions.
        group: the column whose values stay together in a split.
        split: the column that names the split of each image.
        root: the folder that the paths of a manifest start from; default: its own.
        hub_config: which configuration of a hub set.
        hub_split: which of its splits; default: train.
    """

    path: str | None = None
    label: str | None = None
    caption: str | None = None
    group: str | None = None
    split: str | None = None
    root: Path | None = None
    hub_config: str | None = None
    hub_split: str | None = None


FIELDS_OF = {
    "folder of images": (),
    "manifest": ("path", "label", "caption", "group", "split", "root"),
    "tar set": (),
    "hub set": ("path", "label", "caption", "group", "hub_config", "hub_split"),
}


def open_source(
    spec: str,
    naming: Naming = Naming(),  # noqa: B008  it is immutable
    *,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Source:
    """Read what `spec` names, without its images.

    Args:
        spec: a folder with one sub-folder per class, a .csv, .tsv or .parquet file, shards (a
            file, a folder or a brace pattern), or hf:NAME.
        naming: how to read it.
        classes: names in the order of the labels.
        workers: processes that read the headers of large tar sets.
        progress: show a bar.
    """
    path = Path(spec)
    if spec.startswith(HUB) and not spec.startswith(f"{HUB}//"):  # a URL of shards
        _check_naming("hub set", naming)
        dataset = load_hub(spec.removeprefix(HUB), naming.hub_config, naming.hub_split or "train")
        return read_hub(
            dataset,
            image=naming.path,
            label=naming.label,
            caption=naming.caption,
            group=naming.group,
            classes=classes,
        )
    if path.suffix.lower() in TABLE_SUFFIXES:
        _check_naming("manifest", naming)
        table = read_table(path, naming.path or PATH)
        columns = choose_columns(
            list(table.columns),
            path,
            path=naming.path,
            label=naming.label,
            caption=naming.caption,
            group=naming.group,
            split=naming.split,
        )
        return read_listed(table, columns, naming.root or path.parent, classes)
    if path.is_dir() and not any(path.glob("*.tar")):
        _check_naming("folder of images", naming)
        return read_folder(path, classes)
    _check_naming("tar set", naming)
    shards = find_shards(spec, "SOURCE")
    return read_tars(shards, classes, workers=workers, progress=progress)


def _check_naming(kind: str, naming: Naming) -> None:
    for name, value in naming._asdict().items():
        if value is not None and name not in FIELDS_OF[kind]:
            allowed = ", ".join(FIELDS_OF[kind]) or "nothing"
            raise ConfigError(f"{name}={str(value)!r}: of a {kind}, {allowed} can be named")
