"""Names the place in a tower where we read and patch."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Site:
    """A layer (negative counts from the end), a stream and the tokens that are read there."""

    layer: int = -1
    stream: str = "residual"
    tokens: str = "cls"

    def to_json(self) -> dict[str, str | int]:
        """Plain fields, as files record them."""
        return asdict(self)
