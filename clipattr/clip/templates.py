"""What stands in a prompt: templates with a {} for the class name, and lists of class names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from open_clip.zero_shot_metadata import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)

from clipattr.errors import ConfigError, DataError

SLOT = "{}"
TEMPLATES = {
    "imagenet_80": tuple(template(SLOT) for template in OPENAI_IMAGENET_TEMPLATES),
    "imagenet_7": tuple(template(SLOT) for template in SIMPLE_IMAGENET_TEMPLATES),
    "simple": ("a photo of a {}.",),
    "none": (SLOT,),
}
IMAGENET = "imagenet"


class ClassNames(NamedTuple):
    """One entry per class: `words` stand in its prompts, `names` tell the classes apart.

    They differ where two classes have one word, as two pairs of ImageNet's classes do.
    """

    words: tuple[str, ...]
    names: tuple[str, ...]


def load_templates(name: str, *, setting: str = "templates") -> tuple[str, ...]:
    """The templates of a named set, of a text file (one a line), or the one that `name` itself is.

    `setting` is what an error calls it.
    The 80 templates and the 7 best are those of Radford et al. 2021, Learning transferable visual
    models from natural language supervision, as open_clip ships them.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if SLOT in name:
        return (name,)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"{setting}={name!r}: neither a set ({', '.join(TEMPLATES)}), nor a template with "
            f"{SLOT}, nor a text file"
        )
    templates = _read_lines(path)
    for number, template in enumerate(templates, start=1):
        if SLOT not in template:
            raise DataError(
                f"{path}, line {number}: {template!r} has no {SLOT}, the place of the class name"
            )
    return templates


def load_class_names(classes: Sequence[str], *, setting: str = "classes") -> ClassNames:
    """The classes themselves, or of one entry: `imagenet`, or a text file with one name a line.

    `setting` is what an error calls them.
    """
    if list(classes) == [IMAGENET]:
        words = tuple(IMAGENET_CLASSNAMES)
        shared = {word for word in words if words.count(word) > 1}
        names = tuple(
            f"{word} ({number})" if word in shared else word for number, word in enumerate(words)
        )
        return ClassNames(words, names)
    if len(classes) > 1:
        return ClassNames(tuple(classes), tuple(classes))
    path = Path(classes[0])
    if not path.is_file():
        raise ConfigError(
            f"{setting}={list(classes)}: one entry is {IMAGENET} or a text file with one name a "
            "line; name at least two classes"
        )
    names = _read_lines(path)
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if first.setdefault(name, number) != number:
            raise DataError(f"{path}, line {number}: {name!r} stands in line {first[name]} as well")
    if len(names) < 2:
        raise DataError(f"{path}: holds one class name, at least two are needed")
    return ClassNames(names, names)


def _read_lines(path: Path) -> tuple[str, ...]:
    """The stripped lines of a UTF-8 file; a blank one would shift the numbers of the others."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: is not UTF-8 ({error.reason})") from None
    lines = tuple(line.strip() for line in text.rstrip().split("\n"))
    if lines == ("",):
        raise DataError(f"{path}: is empty; write one entry a line")
    if "" in lines:
        raise DataError(f"{path}, line {lines.index('') + 1}: is blank; write one entry a line")
    return lines
