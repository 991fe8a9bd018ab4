"""Build image shards: WebDataset tars in the layout that img2dataset writes.

A shard is a pure function of its source and options, and it has its name only when it is complete:
whatever the number of processes, and however often the build was killed, the bytes are the same.
Each shard has a record beside it; a shard without one does not exist.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL
from tqdm import tqdm

from clipattr.atomic import write_text
from clipattr.build.build_report import BuildReport, finish, summarise, write_failures
from clipattr.build.build_shard import Job, write_shard
from clipattr.build.pictures import Pictures
from clipattr.build.placement import Limits, place_samples
from clipattr.build.sources import Failure, Source, hash_rows
from clipattr.data.parallel import map_in_processes
from clipattr.data.store import check_same, read_json
from clipattr.errors import ConfigError, DataError

FORMAT = 1
PLAN = "plan.json"
# So many broken images beyond what is allowed are listed before the build gives up.
SHOWN = 100


class Options(NamedTuple):
    """What to make of a source.

    Attributes:
        limits: how much a shard holds.
        pictures: what to do with images.
        split: parts, such as {"train": 0.9, "val": 0.1}, each a folder; None for a single set, or
            for the splits that the source has.
        shuffle: mix the samples. Shards that are sorted by class ruin training.
        seed: another one gives another order, but never another split.
    """

    limits: Limits = Limits()
    pictures: Pictures = Pictures()
    split: dict[str, float] | None = None
    shuffle: bool = True
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for what cannot be done."""
        self.pictures.check()
        if not 1 <= self.limits.samples <= 1_000_000:
            raise ConfigError(
                f"{self.limits.samples} samples per shard: allowed are 1 to 1,000,000"
            )
        if self.limits.bytes < 1:
            raise ConfigError(f"{self.limits.bytes} bytes per shard: allowed are 1 and more")


def build_shards(
    source: Source,
    folder: Path,
    options: Options = Options(),  # noqa: B008  it is immutable
    *,
    max_bad_fraction: float = 0.0,
    workers: int = 0,
    progress: bool = False,
) -> BuildReport:
    """Write the shards that are missing, and then `report.json`.

    All broken images are found before any of them ends the build, and the shards stay: repeated
    with a larger `max_bad_fraction`, the build is done.

    Args:
        source: the samples.
        folder: where; it may hold a part of the shards, or all of them.
        options: what to make of the source. A folder that was begun with others is refused.
        max_bad_fraction: how much of the source may be left out.
        workers: processes.
        progress: show a bar.

    Raises:
        DataError: when more is wrong with the source than allowed; `failures.jsonl` lists all.
    """
    options.check()
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction={max_bad_fraction}: allowed are 0 to 1")
    _check_folder(source, folder)
    n_all = len(source.names) + len(source.failures)
    allowed = int(max_bad_fraction * n_all)
    plan = describe(source, options)
    _compare_plan(folder, plan, options.split or set(source.splits or ()))
    try:
        _check_failures(folder, source.failures, n_all, allowed)
        jobs = _make_jobs(source, folder, options)
        if not (folder / PLAN).exists():
            write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")
        failures = list(source.failures)
        writing = _write_missing(jobs, options.pictures, workers=workers, progress=progress)
        with closing(writing):
            for found in writing:
                failures += found
                note = "The build has stopped on the way. "
                _check_failures(folder, failures, n_all, allowed + SHOWN, note)
        report = summarise(folder, source, plan, jobs)
        _check_failures(folder, report.failures, n_all, allowed)
        finish(report)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error
    return report


def _make_jobs(source: Source, folder: Path, options: Options) -> list[Job]:
    if not source.names:
        raise DataError("the source holds no sample")
    places = place_samples(
        source, options.limits, split=options.split, shuffle=options.shuffle, seed=options.seed
    )
    return [Job(folder / place.split, place, source.items(place.rows.tolist())) for place in places]


def describe(source: Source, options: Options) -> dict[str, object]:
    """What decides the bytes of the shards, as plain JSON."""
    pictures = options.pictures
    own_splits = None if options.split else source.splits
    rewrites = bool(pictures.encode or pictures.resize)
    return {
        "format": FORMAT,
        "source": {
            "kind": source.kind,
            "samples": len(source.names),
            "failures": len(source.failures),
            "sha256": source.sha256,
            "groups": None if source.groups is None else hash_rows(source.groups),
        },
        "classes": None if source.classes is None else list(source.classes),
        "limits": options.limits._asdict(),
        "pictures": pictures._asdict(),
        "pillow": PIL.__version__ if rewrites else None,
        "split": options.split and [[name, part] for name, part in options.split.items()],
        "source_splits": None if own_splits is None else hash_rows(own_splits),
        "shuffle": options.shuffle,
        "seed": options.seed,
    }


def _check_folder(source: Source, folder: Path) -> None:
    searched = source.folder
    if searched is not None and folder.resolve().is_relative_to(searched.resolve()):
        raise ConfigError(f"{folder} lies in the source {searched}: choose a folder outside of it")


def _compare_plan(folder: Path, plan: Mapping[str, object], parts: Iterable[str]) -> None:
    path = folder / PLAN
    if path.exists():
        found = read_json(path)
        for name, value in plan.items():
            check_same(folder, name, found.get(name), value)
        return
    for part in ("", *parts):
        foreign = sorted((folder / part).glob("*.tar"))
        if foreign:
            raise DataError(f"{foreign[0]} is there, and of no build: use another folder")


def _check_failures(
    folder: Path, failures: list[Failure], n_all: int, allowed: int, note: str = ""
) -> None:
    """Raise DataError when there are more failures than allowed."""
    if len(failures) <= allowed:
        return
    path = write_failures(folder, failures)
    counts = Counter(failure.trouble.value for failure in failures)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    shown = "".join(f"\n  {failure}" for failure in failures[:10])
    more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
    raise DataError(
        f"{len(failures)} of {n_all} cannot be used ({kinds}); max_bad_fraction allows {allowed}. "
        f"{note}Allow more, and what is written is kept; or repair the source, delete {folder} and "
        f"build again. They are listed in {path}:{shown}{more}"
    )


def _write_missing(
    jobs: list[Job], pictures: Pictures, *, workers: int, progress: bool
) -> Generator[list[Failure]]:
    """Write the shards without a record; what is left out of each."""
    missing = [job for job in jobs if not job.is_done()]
    write = partial(write_shard, pictures=pictures)
    results = map_in_processes(write, missing, workers=workers)
    total, n_left = (sum(len(job.items) for job in some) for some in (jobs, missing))
    with tqdm(
        total=total, initial=total - n_left, desc="shards", unit="sample", disable=not progress
    ) as bar:
        for job, record in zip(missing, results, strict=True):
            bar.update(len(job.items))
            yield record.failures
