"""Console scripts beside training and evaluation."""

import argparse
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipattr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from clipattr.data.check import Report

USER_ERROR = 2
INTERRUPTED = 130


def index() -> None:
    """Check shards: `clipattr-index SHARDS [--fields jpg,cls] [--checksums] [--cache DIR]`."""
    sys.exit(run_index(sys.argv[1:]))


def run_index(arguments: list[str]) -> int:
    """The exit code: 0 when nothing is wrong, 1 when something is, 2 for what cannot be asked."""
    options = _index_parser().parse_args(arguments)
    fields = [name.strip().lower() for name in options.fields.split(",") if name.strip()]
    # Late on purpose: this imports torch, and a typo must die in under a second.
    from clipattr.data.check import check_shards
    from clipattr.data.shards import find_shards

    find = partial(find_shards, cache=options.cache)
    try:
        paths = [path for spec in options.shards for path in find(spec, "SHARDS")]
        report = check_shards(
            paths,
            fields,
            options.checksums,
            cache=options.cache,
            workers=options.workers,
            progress=sys.stderr.isatty(),
        )
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return INTERRUPTED
    sys.stdout.write(_format(report))
    return 1 if report.problems else 0


def _format(report: "Report") -> str:
    """One line for each problem, what there is, and how many problems of each kind."""
    lines = [str(problem) for problem in report.problems]
    lines.append(
        f"{report.n_shards} shards, {report.n_samples} samples, {report.n_bytes} bytes; "
        "samples with each field:"
    )
    for name, count in report.fields.items():
        lines.append(f"  {name}: {'all' if count == report.n_samples else count}")
    counts: Counter[str] = Counter()
    for problem in report.problems:
        counts[problem.fault.name.replace("_", " ")] += problem.n_alike
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    lines.append(f"wrong: {found}" if found else "nothing is wrong")
    return "\n".join(lines) + "\n"


def _index_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipattr-index",
        description="Index WebDataset shards, and say what is wrong with them, where, and what to "
        "do. Exit code 0: nothing is wrong. 1: something is. 2: it could not be checked.",
    )
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="files, folders, brace patterns; URLs too"
    )
    parser.add_argument(
        "--fields", default="", metavar="jpg,cls", help="fields that every sample must have"
    )
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="read all bytes: compare with index.json beside the shards, enter new shards there",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the index there, as data.cache of a config does: training starts at once; "
        "without it, no remote shard is copied",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes for large sets (default: the cores)",
    )
    return parser
