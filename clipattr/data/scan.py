"""One shard in columns: its samples and where their fields lie, and all that is wrong with it.

A sample is the members that share a name up to its first dot, as everywhere in WebDataset; fields
are lower case. Not samples: names without a key or a field (hidden files, README, directories) and
names like __meta__.json, which describe the shard.
"""

import unicodedata

import numpy as np

from clipattr.data.faults import Fault, Problems
from clipattr.data.remote import RemoteShard, Shard
from clipattr.data.shards import IMAGE_FIELDS
from clipattr.data.tables import ShardTable
from clipattr.data.tar import Member, TarError, walk_members
from clipattr.data.transfer import TransferError

MAX_FIELDS = 64
MAX_NAME_BYTES = 1024


def scan_shard(shard: Shard) -> tuple[ShardTable, Problems]:
    """Read all headers of a shard. What stands before a damage is in the table.

    A damaged copy of a remote shard is discarded.
    """
    problems = Problems(str(shard))
    scan = _Scan(problems)
    try:
        for member in walk_members(shard):
            if is_file(member, problems):
                scan.add(member)
    except TarError as damage:
        fault = Fault.damaged if damage.byte else Fault.no_tar
        problems.add(fault, damage.what, byte=damage.byte)
        if isinstance(shard, RemoteShard):
            shard.discard_copy()
    except OSError as error:
        fault = Fault.unreachable if isinstance(error, TransferError) else Fault.damaged
        problems.add(fault, f"cannot be read: {error.strerror}")
    table = scan.table()
    find_dotted(table, problems)
    if not len(table.keys) and problems.first_fatal() is None:
        problems.add(Fault.empty, "holds no sample")
    return table, problems


def is_file(member: Member, problems: Problems) -> bool:
    """Whether a member can hold a field; links, devices and unusable names are problems."""
    name = member.name
    if member.kind not in ("file", "directory"):
        what = f"{name!r} is a {member.kind}, not a file"
        problems.add(Fault.not_a_file, what, byte=member.header)
        return False
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        what = f"the name {name!r} leads out of the shard"
        problems.add(Fault.unsafe_name, what, byte=member.header)
        return False
    if not name.isprintable() or len(name) > MAX_NAME_BYTES // 4:
        # Control characters, lone surrogates (bytes that are not UTF-8), separators of lines.
        kinds = {unicodedata.category(character) for character in name}
        if kinds & {"Cc", "Cs", "Zl", "Zp"} or len(name.encode()) > MAX_NAME_BYTES:
            what = f"the name {ascii(name[:80])} cannot be used"
            problems.add(Fault.unreadable_name, what, byte=member.header)
            return False
    return member.kind == "file"


def split_name(name: str) -> tuple[str, str]:
    """The key and the field of a member; no key when it belongs to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, field = last.partition(".")
    if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return folder + slash + stem, field.lower()


class _Scan:
    """Collects members into samples."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.rows: dict[str, int] = {}
        self.columns: dict[str, int] = {}
        self.cells: dict[int, None] = {}  # row * MAX_FIELDS + column
        self.offsets: list[int] = []
        self.sizes: list[int] = []

    def add(self, member: Member) -> None:
        key, field = split_name(member.name)
        if not key:
            return
        column = self.columns.setdefault(field, len(self.columns))
        if column >= MAX_FIELDS:
            what = f"{member.name!r} is field number {column + 1} of the shard"
            self.problems.add(Fault.too_many_fields, what, key=key, byte=member.header)
            return
        row = self.rows.setdefault(key, len(self.rows))
        cell = row * MAX_FIELDS + column
        if cell in self.cells:
            what = f"the field {field!r} comes twice"
            self.problems.add(Fault.field_twice, what, key=key, byte=member.header)
            return
        if row < len(self.rows) - 1:
            what = f"{member.name!r} comes after another sample has begun"
            self.problems.add(Fault.scattered, what, key=key, byte=member.header)
        self.cells[cell] = None
        self.offsets.append(member.offset)
        self.sizes.append(member.size)

    def table(self) -> ShardTable:
        fields = tuple(self.columns)[:MAX_FIELDS]
        cells = np.divmod(np.array(list(self.cells), dtype=np.int64), MAX_FIELDS)
        offsets = np.full((len(self.rows), len(fields)), -1, dtype=np.int64)
        sizes = offsets.copy()
        offsets[cells], sizes[cells] = self.offsets, self.sizes
        keys = np.array([key.encode() for key in self.rows], dtype=np.bytes_)
        return ShardTable(fields, keys, offsets, sizes)


def find_dotted(table: ShardTable, problems: Problems) -> None:
    """Samples without an image of their own and with images behind a dot, such as a.v1.jpg.

    Two of them were two samples to who wrote the shard.
    """
    plain = [name in IMAGE_FIELDS for name in table.fields]
    dotted = ["." in name and name.rpartition(".")[2] in IMAGE_FIELDS for name in table.fields]
    is_there = table.offsets >= 0
    n_dotted = np.where(is_there[:, plain].any(1), 0, is_there[:, dotted].sum(1))
    for row in np.flatnonzero(n_dotted).tolist():
        fault = Fault.merged if n_dotted[row] > 1 else Fault.dotted
        what = f"has no image, but the fields {', '.join(table.names(row))}"
        problems.add(fault, what, key=table.key(row), byte=table.first_byte(row))
