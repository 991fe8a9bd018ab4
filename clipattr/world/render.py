"""Draw a scene. The shape is drawn at twice the size and reduced, everything else at image size."""

import math

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from clipattr.world.factors import RGB_OF_COLOUR, Scene, Sticker
from clipattr.world.outlines import outlines

IMAGE_SIZE = 96
OVERSAMPLING = 2
FONT_SIZE = 19
BORDER_COLOUR, BORDER_WIDTH = (28, 22, 26), 4
Pixels = Float[np.ndarray, "height width 3"]
Plane = Float[np.ndarray, "height width"]


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    rng = np.random.default_rng(scene.noise)
    pixels = _background(scene.background, rng)
    mask, border = _shape_masks(scene)
    pixels += border[..., None] * (np.asarray(BORDER_COLOUR, np.float32) - pixels)
    pixels += mask[..., None] * (_texture(scene) - pixels)
    if scene.is_cracked:
        pixels *= 1 - 0.85 * (_crack(scene, rng) * mask)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if scene.written:
        _write(image, scene.written, rng)
    for sticker in scene.stickers:
        paste_sticker(image, Sticker[sticker], scene.noise)
    return image


def _grid() -> tuple[Plane, Plane]:
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    return x, y


def _background(name: str, rng: np.random.Generator) -> Pixels:
    x, y = _grid()
    phase, tilt = rng.uniform(0, 2 * math.pi), rng.uniform(-0.06, 0.06)
    grain = rng.normal(0, 1, (IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    match name:
        case "sea":
            wave = np.sin(y * 0.55 + 1.6 * np.sin(x * 0.13 + phase) + tilt * x)
            return _tint((38, 98, 132), 22 * wave + 3 * grain)
        case "grass":
            blade = np.sin(x * 1.1 + 2 * np.sin(y * 0.2 + phase)) * np.cos(y * 0.25 + phase)
            return _tint((96, 134, 62), 18 * blade + 12 * grain)
        case "sand":
            dune = np.sin((x + y) * 0.07 + phase)
            return _tint((202, 182, 138), 9 * dune + 14 * grain)
        case "sky":
            cloud = np.sin(x * 0.09 + phase) + np.sin(y * 0.13 + 0.05 * x + 2 * phase)
            return _tint((150, 190, 228), 22 * np.maximum(cloud - 0.4, 0) - 0.2 * y + grain)
        case "brick":
            row = (y + 12 * phase) // 12
            joint = ((y + 12 * phase) % 12 < 2) | ((x + 12 * (row % 2) + 24 * phase) % 24 < 2)
            return _tint((146, 92, 78), 62.0 * joint + 6 * grain)
        case "night":
            stars = 190.0 * (rng.random((IMAGE_SIZE, IMAGE_SIZE)) > 0.988)
            return _tint((26, 24, 44), stars.astype(np.float32) + 3 * grain)
    raise ValueError(f"background {name!r} has no drawing")


def _tint(colour: tuple[int, int, int], light: Plane) -> Pixels:
    return np.asarray(colour, dtype=np.float32) + light.astype(np.float32)[..., None]


def _rotation(angle: float) -> Float[np.ndarray, "2 2"]:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _shape_masks(scene: Scene) -> tuple[Plane, Plane]:
    """Where the shape is, and the dark border just outside of it (and inside its holes)."""
    side = IMAGE_SIZE * OVERSAMPLING
    shape, border = Image.new("L", (side, side), 0), Image.new("L", (side, side), 0)
    draw_shape, draw_border = ImageDraw.Draw(shape), ImageDraw.Draw(border)
    filled, holes = outlines(scene.shape)
    for polygons, value in ((filled, 255), (holes, 0)):
        for polygon in polygons:
            turned = polygon @ _rotation(scene.angle) * scene.radius + np.array(scene.centre)
            points = [(float(px), float(py)) for px, py in turned * side]
            draw_shape.polygon(points, fill=value)
            # Twice the width: the half that falls on the shape is covered by it.
            draw_border.line([*points, *points[:2]], 255, 2 * BORDER_WIDTH, joint="curve")
    return _reduce(shape), _reduce(border)


def _reduce(mask: Image.Image) -> Plane:
    return np.asarray(mask.reduce(OVERSAMPLING), dtype=np.float32) / 255


def _texture(scene: Scene) -> Pixels:
    x, y = _grid()
    centre_x, centre_y = (IMAGE_SIZE * share for share in scene.centre)
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    u = (x - centre_x) * cos + (y - centre_y) * sin
    v = (y - centre_y) * cos - (x - centre_x) * sin
    match scene.texture:
        case "plain":
            dark = np.zeros_like(u)
        case "striped":
            dark = (v % 9 < 4).astype(np.float32)
        case "dotted":
            dark = ((u % 11 - 5.5) ** 2 + (v % 11 - 5.5) ** 2 < 10).astype(np.float32)
        case "checked":
            dark = ((u // 8 + v // 8) % 2).astype(np.float32)
        case _:
            raise ValueError(f"texture {scene.texture!r} has no drawing")
    colour = np.asarray(RGB_OF_COLOUR[scene.colour], dtype=np.float32)
    return colour * (1 - 0.45 * dark[..., None])


def _crack(scene: Scene, rng: np.random.Generator) -> Plane:
    """A thin dark zigzag through the shape: the subtle property of the probe task."""
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    along = np.linspace(-1.05, 1.05, 8)
    across = rng.uniform(-0.2, 0.2, 8)
    points = np.stack([along, across], axis=1) @ _rotation(rng.uniform(0, math.pi))
    points = (points * scene.radius + np.array(scene.centre)) * IMAGE_SIZE
    ImageDraw.Draw(canvas).line([(float(px), float(py)) for px, py in points], fill=255, width=3)
    return np.asarray(canvas, dtype=np.float32) / 255


def _write(image: Image.Image, word: str, rng: np.random.Generator) -> None:
    """The word in black on a white plate at the lower edge."""
    font = ImageFont.load_default(FONT_SIZE)
    left, top, right, bottom = font.getbbox(word)
    width, height = math.ceil(right - left) + 6, math.ceil(bottom - top) + 6
    corner_x = int(rng.integers(2, max(3, IMAGE_SIZE - width - 2)))
    corner_y = IMAGE_SIZE - height - int(rng.integers(2, 8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((corner_x, corner_y, corner_x + width, corner_y + height), fill=(250, 250, 250))
    draw.text((corner_x + 3 - left, corner_y + 3 - top), word, fill=(10, 10, 10), font=font)


def paste_sticker(image: Image.Image, sticker: Sticker, noise: int) -> None:
    """Paste a sticker into its upper corner, shifted by a few pixels; the rest is untouched."""
    rng = np.random.default_rng([noise, 7, list(Sticker).index(sticker)])
    dx, dy = (int(value) for value in rng.integers(0, 6, 2))
    draw = ImageDraw.Draw(image)
    match sticker:
        case Sticker.tag:
            x, y = 2 + dx, 2 + dy
            draw.rectangle((x, y, x + 17, y + 13), fill=(255, 60, 170), outline=(60, 0, 40))
            draw.line((x + 3, y + 5, x + 14, y + 5), fill=(255, 255, 255), width=2)
            draw.line((x + 3, y + 9, x + 11, y + 9), fill=(255, 255, 255), width=2)
        case Sticker.seal:
            x, y = IMAGE_SIZE - 20 - dx, 2 + dy
            draw.ellipse((x, y, x + 17, y + 17), fill=(120, 255, 40), outline=(20, 70, 0))
            draw.ellipse((x + 5, y + 5, x + 12, y + 12), fill=(20, 70, 0))
