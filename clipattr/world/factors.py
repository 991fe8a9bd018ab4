"""What a scene is made of, and everything that is planted in the world on purpose.

Shapes have a noun, the word that captions use. Planted: `bolt` names two unrelated shapes
(polysemous word), `star fish` is made of two other nouns (compound noun), `TYPED_NOUNS` may be
written in the picture, `boat` nearly always stands on `sea`, and the stickers are the cues of the
probe task.
"""

from dataclasses import asdict, dataclass
from enum import Enum

NOUN_OF_SHAPE = {
    "disc": "disc",
    "square": "square",
    "triangle": "triangle",
    "heart": "heart",
    "moon": "moon",
    "cross": "cross",
    "arrow": "arrow",
    "ring": "ring",
    "star": "star",
    "fish": "fish",
    "starfish": "star fish",
    "boat": "boat",
    "lightning": "bolt",
    "hexnut": "bolt",
    "drop": "drop",
}
SHAPES = tuple(NOUN_OF_SHAPE)
NOUNS = tuple(dict.fromkeys(NOUN_OF_SHAPE.values()))

RGB_OF_COLOUR = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 222, 60),
    "green": (50, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 85, 205),
    "purple": (140, 60, 170),
    "white": (245, 245, 245),
}
COLOURS = tuple(RGB_OF_COLOUR)
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("sea", "grass", "sand", "sky", "brick", "night")

TYPED_NOUNS = ("heart", "moon", "fish", "star")
POLYSEMOUS_NOUN = "bolt"
COMPOUND_NOUN = "star fish"
SPURIOUS_SHAPE, SPURIOUS_BACKGROUND = "boat", "sea"


class Sticker(Enum):
    """Pasted cues: in the task's training split the tag goes with the label, the seal does not."""

    tag = "tag"
    seal = "seal"


@dataclass(frozen=True)
class Scene:
    """Every factor of one image; `asdict` of it is the sample's JSON."""

    shape: str
    colour: str
    texture: str
    background: str
    is_cracked: bool
    written: str
    """the noun written in the picture, or an empty string"""
    stickers: tuple[str, ...]
    centre: tuple[float, float]
    """of the shape, as a share of the image's side"""
    radius: float
    """of the shape, as a share of the image's side"""
    angle: float
    """of the shape, in radians"""
    noise: int
    """seed of the background's and the crack's details"""

    @property
    def noun(self) -> str:
        """The word that captions use for the shape."""
        return NOUN_OF_SHAPE[self.shape]

    def to_json(self) -> dict[str, object]:
        """All factors, with the noun and one flag per sticker."""
        flags = {f"has_{sticker.name}": sticker.name in self.stickers for sticker in Sticker}
        return {**asdict(self), "noun": self.noun, **flags}
