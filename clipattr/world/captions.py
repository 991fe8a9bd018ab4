"""Captions from a small grammar, words left out at random.

    [opening] a [cracked] [texture] [colour] (noun | "shape") [on background] [with a sticker]

What is written in the picture is never mentioned, and both shapes of the polysemous noun are called
by it: these are the failures that the world plants.
"""

import numpy as np

from clipattr.world.factors import Scene

OPENINGS = ("", "a photo of", "a picture of", "an image of")
KEEP_COLOUR, KEEP_TEXTURE, KEEP_BACKGROUND = 0.4, 0.45, 0.4
KEEP_NOUN, KEEP_CRACKED, KEEP_STICKER = 0.95, 0.7, 0.6


def write_caption(rng: np.random.Generator, scene: Scene) -> str:
    """One caption of the scene."""
    words = [OPENINGS[rng.integers(len(OPENINGS))], "a"]
    optional = [
        ("cracked", scene.is_cracked, KEEP_CRACKED),
        (scene.texture, True, KEEP_TEXTURE),
        (scene.colour, True, KEEP_COLOUR),
    ]
    # Every word draws its number, so that one factor never shifts the draws of another.
    words += [word for word, is_true, keep in optional if (rng.random() < keep) and is_true]
    words.append(scene.noun if rng.random() < KEEP_NOUN else "shape")
    if rng.random() < KEEP_BACKGROUND:
        words.append(f"on {scene.background}")
    for sticker in scene.stickers:
        if rng.random() < KEEP_STICKER:
            words.append(f"with a {sticker}")
    return " ".join(word for word in words if word)
