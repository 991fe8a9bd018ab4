"""The words among which the label of a latent is looked for, and where each of them came from."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from clipattr.errors import ConfigError, DataError

IMAGENET = "imagenet"
COMMENT = "#"
_LITERAL = "given"
# A separator or a suffix; "St. Bernard" and "U.S" have neither.
_LOOKS_LIKE_FILE = re.compile(r"[/\\]|\.[A-Za-z]{2,5}$")


class Source(NamedTuple):
    """What one entry gave: its words, of which `n_new` stood in none before, nor twice in it."""

    name: str
    n_words: int
    n_new: int


class Vocabulary(NamedTuple):
    """Every word once, in the order of the entries; `text_head` embeds them with any templates."""

    words: tuple[str, ...]
    origins: tuple[tuple[str, ...], ...]
    """of each word the sources that have it"""
    sources: tuple[Source, ...]

    @property
    def n_duplicates(self) -> int:
        """How many words were merged with one that was there."""
        return sum(source.n_words - source.n_new for source in self.sources)


def load_vocabulary(entries: Sequence[str]) -> Vocabulary:
    """The words of all entries.

    An entry is `imagenet`, for its class names as open_clip ships them; a UTF-8 text file with one
    word or phrase a line, where blank lines and those that start with # do not count; or the word
    itself. What has a / or a suffix such as .txt is a file.
    """
    origins: dict[str, list[str]] = {}
    sources: dict[str, Source] = {}
    for name, word in _all_words(entries):
        found = origins.setdefault(word, [])
        so_far = sources.get(name, Source(name, 0, 0))
        sources[name] = Source(name, so_far.n_words + 1, so_far.n_new + (not found))
        if name not in found:
            found.append(name)
    if len(origins) < 2:
        raise ConfigError(
            f"vocabulary={list(entries)} has {len(origins)} different words; a label is chosen "
            "among two or more"
        )
    by_word = tuple(tuple(names) for names in origins.values())
    return Vocabulary(tuple(origins), by_word, tuple(sources.values()))


def _all_words(entries: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(source, word), as they come."""
    for entry in entries:
        if entry == IMAGENET:
            yield from ((IMAGENET, word) for word in IMAGENET_CLASSNAMES)
        elif _LOOKS_LIKE_FILE.search(entry):
            yield from ((entry, word) for word in _read_words(Path(entry)))
        elif entry.strip():
            yield _LITERAL, entry.strip()
        else:
            raise ConfigError(f"vocabulary={list(entries)}: an entry is blank")


def _read_words(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(
            f"vocabulary entry {str(path)!r}: no such file. What has a / or a suffix is a file "
            f"with one word a line; other entries are {IMAGENET} or the word itself (a word with a "
            "/ or a suffix can stand in a file)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: is not UTF-8 ({error.reason})") from None
    lines = (line.strip() for line in text.split("\n"))
    words = [line for line in lines if line and not line.startswith(COMMENT)]
    if not words:
        raise DataError(f"{path}: has no words; write one a line (# starts a comment)")
    return words
