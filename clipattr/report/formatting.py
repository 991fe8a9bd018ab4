"""Values to text: the jinja2 filters of the page. A number that is not finite is never printed."""

import base64
import math

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval

NOT_DEFINED = "not defined"
_MINUS = "\N{MINUS SIGN}"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def number(value: float, digits: int = 3) -> str:
    """Fixed-point text with a true minus sign; a value that rounds to zero carries no sign."""
    if not math.isfinite(value):
        return NOT_DEFINED
    text = f"{abs(value):.{digits}f}"
    return f"{_MINUS}{text}" if value < 0 and float(text) != 0 else text


def signed(value: float, digits: int = 3) -> str:
    """Like `number`, with a plus sign where the value is positive."""
    text = number(value, digits)
    return f"+{text}" if math.isfinite(value) and value > 0 and float(text) != 0 else text


def percent(value: float, digits: int = 1) -> str:
    """A share between 0 and 1 as per cent."""
    return (
        f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%" if math.isfinite(value) else NOT_DEFINED
    )


def bounds(interval: Interval, digits: int = 3) -> str:
    """The ends of an interval, or the word for an interval that has none."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"[interval {NOT_DEFINED}]"
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def is_defined(interval: Interval) -> bool:
    """Whether there is a number, and an interval around it."""
    return all(math.isfinite(value) for value in interval)


def digits_of(interval: Interval, digits: int = 3, reference: float = 0.0) -> int:
    """As many digits as it takes to see that an interval leaves the reference out."""
    low, high = interval.low, interval.high
    if not is_defined(interval) or low <= reference <= high:
        return digits
    needed = digits
    while any(round(bound, needed) == reference for bound in (low, high)):
        needed += 1
    return needed


def picture(png: bytes) -> str:
    """The bytes of a PNG file as a data URI, so that the page needs no other file."""
    if not png.startswith(_PNG_SIGNATURE):
        raise DataError(
            f"Report picture starts with {png[:8]!r}; pictures of the page must be PNG files."
        )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def log_position(rank: int, n_latents: int) -> float:
    """Place of a rank on a logarithmic track, in per cent: 0 for rank 1, 100 for the last rank."""
    return 100 * math.log(rank) / math.log(n_latents) if n_latents > 1 else 0.0


def bar_length(value: float, largest: float) -> float:
    """Signed length of a bar in per cent of the half width: -50 to 50."""
    if not math.isfinite(value) or largest == 0:
        return 0.0
    return 50 * value / largest
