"""What can be wrong with shards, and what to do about it."""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple


class Fault(Enum):
    """Kinds of problem: (what to do, whether training refuses the shard).

    Refused is what would lose, mix up or repeat samples in silence.
    """

    damaged = ("copy or write the shard again; nothing behind this byte can be read", True)
    unreachable = ("start again when its server answers", True)
    no_tar = ("give an uncompressed tar file", True)
    key_twice = ("rename the samples: keys must be unique over all shards", True)
    field_twice = ("rename one of the two members", True)
    merged = (
        "rename the members: WebDataset ends the key at the first dot of the name, so that these "
        "images are one sample",
        True,
    )
    unsafe_name = ("write the shard with relative names", True)
    unreadable_name = ("write the shard with names in UTF-8 without control characters", True)
    not_a_file = ("write the shard with plain files, for example tar --dereference", True)
    too_many_fields = ("rename the members: a field begins at the first dot of the name", True)
    dotted = ("rename the member: WebDataset ends the key at the first dot of the name", False)
    scattered = ("write the members of a sample side by side: webdataset itself reads two", False)
    empty = ("leave the shard out", False)
    lacks_field = ("write the samples again, or leave them out with data.max_bad_fraction", False)
    changed = (
        "get the shard again; if the change was meant, delete its entry in index.json",
        False,
    )
    missing = ("get the shard again; if it was meant to go, delete its entry in index.json", False)

    @property
    def remedy(self) -> str:
        """What to do."""
        return self.value[0]

    @property
    def is_fatal(self) -> bool:
        """Whether training refuses the shard."""
        return self.value[1]


class Problem(NamedTuple):
    """One thing that is wrong; of `n_alike` in one shard, the first."""

    fault: Fault
    shard: str
    what: str
    key: str = ""
    byte: int | None = None
    n_alike: int = 1

    def __str__(self) -> str:
        sample = f", sample {self.key!r}" if self.key else ""
        byte = "" if self.byte is None else f", byte {self.byte}"
        more = f" (and {self.n_alike - 1} more like it)" if self.n_alike > 1 else ""
        return f"{self.shard}{sample}{byte}: {self.what}{more}; {self.fault.remedy}"


class Problems:
    """The problems of one shard, the first of each kind with their number."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self._first: dict[Fault, Problem] = {}

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._first.values())

    def add(self, fault: Fault, what: str, *, key: str = "", byte: int | None = None) -> None:
        """Note a problem."""
        found = self._first.get(fault)
        if found is None:
            self._first[fault] = Problem(fault, self.shard, what, key, byte)
        else:
            self._first[fault] = found._replace(n_alike=found.n_alike + 1)

    def first_fatal(self) -> Problem | None:
        """The first that training refuses."""
        return next((problem for problem in self if problem.fault.is_fatal), None)
