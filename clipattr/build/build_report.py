"""What a build gave: files beside the shards, and a table for a person."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipattr.atomic import write_text
from clipattr.build.build_shard import Job, Record
from clipattr.build.sources import Failure, Source
from clipattr.data.check import Checksum, write_checksums

REPORT = "report.json"
FAILURES = "failures.jsonl"
CLASSES = "classes.txt"
SCHEMA_VERSION = 1
_LISTED = 20


class SplitReport(NamedTuple):
    """The shards of one folder; `fields` and `labels` count samples."""

    name: str
    folder: Path
    shards: dict[str, Checksum]
    samples: int
    fields: dict[str, int]
    labels: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards.values())


class BuildReport(NamedTuple):
    """All of a build. `labels` are named by `classes`, where those are known."""

    folder: Path
    kind: str
    plan: dict[str, object]
    splits: list[SplitReport]
    classes: tuple[str, ...] | None
    failures: list[Failure]
    ignored: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """For `report.json`: no path of this machine is in it."""
        troubles = Counter(failure.trouble.value for failure in self.failures)
        return {
            "schema_version": SCHEMA_VERSION,
            "plan": self.plan,
            "splits": {
                split.name: {
                    "shards": len(split.shards),
                    "samples": split.samples,
                    "bytes": split.size,
                    "fields": split.fields,
                    "classes": self.count_classes(split),
                }
                for split in self.splits
            },
            "failures": dict(troubles.most_common()),
            "ignored": self.ignored,
        }

    def count_classes(self, split: SplitReport) -> dict[str, int]:
        """Samples of each class, in the order of the numbers, with those that have none."""
        if self.classes is not None:
            numbers = range(len(self.classes))
            return {self.classes[n]: split.labels.get(str(n), 0) for n in numbers}
        return dict(sorted(split.labels.items(), key=lambda entry: (len(entry[0]), entry[0])))

    def __str__(self) -> str:
        lines = [
            f"{split.name or self.folder}: {split.samples} samples in {len(split.shards)} shards, "
            f"{split.size / 1e6:.1f} MB; "
            + ", ".join(f"{name} {count}" for name, count in sorted(split.fields.items()))
            for split in self.splits
        ]
        lines += self._class_lines()
        lines += [
            f"ignored: {count} x {kind}" for kind, count in list(self.ignored.items())[:_LISTED]
        ]
        troubles = Counter(failure.trouble.value for failure in self.failures)
        lines += [f"left out: {count} x {kind}" for kind, count in troubles.most_common()]
        if self.failures:
            lines.append(f"what is left out is listed in {self.folder / FAILURES}")
        return "\n".join(lines)

    def _class_lines(self) -> list[str]:
        counts = [self.count_classes(split) for split in self.splits]
        names = list(dict.fromkeys(name for found in counts for name in found))
        if not names:
            return []
        rows = [(name, [found.get(name, 0) for found in counts]) for name in names]
        shown = rows if len(rows) <= _LISTED else rows[: _LISTED // 2] + rows[-_LISTED // 2 :]
        width = max(len(name) for name, _ in shown)
        lines = [
            f"  {name:<{width}}" + "".join(f"  {number:>9}" for number in numbers)
            for name, numbers in shown
        ]
        if len(rows) > _LISTED:
            lines.insert(_LISTED // 2, f"  ... ({len(rows) - _LISTED} more)")
        header = "".join(f"  {split.name or 'samples':>9}" for split in self.splits)
        return [f"  {'class':<{width}}{header}", *lines]


def summarise(
    folder: Path, source: Source, plan: dict[str, object], jobs: Sequence[Job]
) -> BuildReport:
    """The report of shards that are all written, from their records."""
    records: dict[str, list[Record]] = {}
    folders: dict[str, Path] = {}
    for job in jobs:
        records.setdefault(job.place.split, []).append(Record.load(job.record))
        folders[job.place.split] = job.folder
    splits: list[SplitReport] = []
    for name, found in records.items():
        fields: Counter[str] = Counter()
        labels: Counter[str] = Counter()
        for record in found:
            fields.update(record.fields)
            labels.update(record.labels)
        shards = {one.file: Checksum(one.size, one.sha256) for one in found if one.samples}
        n_samples = sum(record.samples for record in found)
        splits.append(
            SplitReport(name, folders[name], shards, n_samples, dict(fields), dict(labels))
        )
    failures = source.failures + [
        failure for found in records.values() for record in found for failure in record.failures
    ]
    return BuildReport(
        folder, source.kind, plan, splits, source.classes, failures, dict(source.ignored)
    )


def finish(report: BuildReport) -> None:
    """Write what belongs to the shards; `report.json` last. A finished build is left as it is."""
    if (report.folder / REPORT).exists():
        return
    for split in report.splits:
        write_checksums(split.folder, split.shards)
        if report.classes is not None:
            lines = "".join(f"{name.strip()}\n" for name in report.classes)
            write_text(split.folder / CLASSES, lines)
    write_failures(report.folder, report.failures)
    for folder in {report.folder, *(split.folder for split in report.splits)}:
        for path in folder.glob(".*.tmp-*"):  # of a process that was killed
            path.unlink(missing_ok=True)
    write_text(report.folder / REPORT, json.dumps(report.to_json(), indent=1) + "\n")


def write_failures(folder: Path, failures: Sequence[Failure]) -> Path:
    """Write `failures.jsonl`."""
    path = folder / FAILURES
    write_text(path, "".join(json.dumps(failure.to_json()) + "\n" for failure in failures))
    return path
