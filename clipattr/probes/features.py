"""What a head reads of an image, in words that stand in its file and can be read back.

    embedding, L2-normalised
    embedding, raw
    site(layer=11, stream=residual, tokens=spatial, drawn=all, pool=mean)
    codes(layer=11, stream=residual, tokens=cls, n_latents=4096, sae=SHA256, pool=none)

Several are joined by ` + `, in the order in which they stand side by side.
"""

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from clipattr.errors import CheckpointError

EMBEDDING = "embedding, L2-normalised"
"""The feature of a probe unless its record says another."""

_RAW = "embedding, raw"
_JOIN = " + "
_CALL = re.compile(r"(site|codes)\((.*)\)")


@dataclass(frozen=True)
class EmbeddingPart:
    """The image embedding."""

    is_normalised: bool = True

    def __str__(self) -> str:
        return EMBEDDING if self.is_normalised else _RAW


@dataclass(frozen=True)
class SitePart:
    """The activation at a site of the image tower."""

    layer: int
    """a resolved number, never counted from the end"""
    stream: str
    tokens: str
    drawn: int | None = None
    """tokens drawn per image by its key; None: all"""
    pool: Literal["none", "mean"] = "none"

    def __str__(self) -> str:
        return _write("site", self)


@dataclass(frozen=True)
class CodesPart:
    """The codes of an SAE at its site, one activation per image and latent."""

    layer: int
    stream: str
    tokens: str
    n_latents: int
    sae: str
    """sha256 of its tensors"""
    pool: Literal["none", "max", "mean", "sum"] = "none"

    def __str__(self) -> str:
        return _write("codes", self)


Part = EmbeddingPart | SitePart | CodesPart


# What the parts allow; the pool by whether there is one token.
_STREAMS = (
    *("residual_before", "heads", "attention", "residual_middle"),
    *("neurons", "mlp", "residual", "embedding"),
)
_WORDS = {"stream": _STREAMS, "tokens": ("cls", "spatial", "all")}
_LEAST = {"layer": 0, "drawn": 1, "n_latents": 1}
_NUMBER = re.compile("[0-9]{1,9}")
_POOLS = {
    (SitePart, True): ("none",),
    (SitePart, False): ("none", "mean"),
    (CodesPart, True): ("none",),
    (CodesPart, False): ("max", "mean", "sum"),
}


@dataclass(frozen=True)
class FeatureSpec:
    """One feature, or several side by side."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return _JOIN.join(map(str, self.parts))

    @property
    def codes(self) -> CodesPart | None:
        """The part that makes the whole sparse."""
        return next((one for one in self.parts if isinstance(one, CodesPart)), None)

    @property
    def has_tokens(self) -> bool:
        """Whether an image has several rows."""
        return any(
            isinstance(one, SitePart) and one.tokens != "cls" and one.pool == "none"
            for one in self.parts
        )


def parse_features(text: str) -> FeatureSpec:
    """The inverse of str(FeatureSpec); CheckpointError for anything else."""
    spec = FeatureSpec(tuple(_parse(part, text) for part in text.split(_JOIN)))
    if str(spec) != text:
        raise CheckpointError(f"feature {text!r}: reads as {str(spec)!r}")
    if spec.has_tokens and len(spec.parts) > 1:
        raise CheckpointError(f"feature {text!r}: tokens stand beside nothing; pool=mean")
    return spec


def _write(name: str, part: Any) -> str:
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    words = [f"{key}={'all' if value is None else value}" for key, value in values.items()]
    return f"{name}({', '.join(words)})"


def _parse(part: str, text: str) -> Part:
    if part in (EMBEDDING, _RAW):
        return EmbeddingPart(part == EMBEDDING)
    found = _CALL.fullmatch(part)
    if found is None:
        raise CheckpointError(
            f"feature {text!r}: expected {EMBEDDING!r}, {_RAW!r}, site(...) or codes(...)"
        )
    kind = SitePart if found[1] == "site" else CodesPart
    pairs = [word.partition("=") for word in found[2].split(", ")]
    words = {name: value for name, _, value in pairs}
    if list(words) != [each.name for each in fields(kind)]:
        raise CheckpointError(f"feature {text!r}: {found[1]} has the fields {list(words)}")
    values = {name: _value(name, word, text) for name, word in words.items()}
    pools = _POOLS[kind, values["tokens"] == "cls"]
    if values["pool"] not in pools:
        raise CheckpointError(
            f"feature {text!r}: pool is {values['pool']!r} of tokens={values['tokens']}, allowed "
            f"are {', '.join(pools)}"
        )
    return kind(**values)


def _value(name: str, word: str, text: str) -> Any:
    if name == "drawn" and word == "all":
        return None
    if name in _WORDS and word not in _WORDS[name]:
        allowed = ", ".join(_WORDS[name])
        raise CheckpointError(f"feature {text!r}: {name} is {word!r}, allowed are {allowed}")
    if name not in _LEAST:
        return word
    if not _NUMBER.fullmatch(word) or int(word) < _LEAST[name]:
        raise CheckpointError(
            f"feature {text!r}: {name} is {word!r}, expected a whole number, at least "
            f"{_LEAST[name]}"
        )
    return int(word)
