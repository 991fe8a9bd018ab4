"""Outlines of the shapes: polygons in a frame where the shape's radius is 1 and y points down."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Polygon = Float[np.ndarray, "_point 2"]  # each has its own number of points
Outline = tuple[list[Polygon], list[Polygon]]


def outlines(shape: str) -> Outline:
    """The filled polygons of a shape, and the holes cut out of them."""
    return _BUILDERS[shape]()


def _angles(n_points: int) -> Float[np.ndarray, " point"]:
    return np.linspace(0.0, 2 * np.pi, n_points, endpoint=False)


def _ellipse(
    width: float, height: float | None = None, centre: tuple[float, float] = (0, 0)
) -> Polygon:
    angle = _angles(48)
    points = np.stack([width * np.cos(angle), (height or width) * np.sin(angle)], axis=1)
    return points + np.array(centre)


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _regular(n_corners: int, radius: float) -> Polygon:
    angle = _angles(n_corners) - np.pi / 2
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star(n_arms: int, outer: float, inner: float) -> Polygon:
    angle = _angles(2 * n_arms) - np.pi / 2
    radius = np.where(np.arange(2 * n_arms) % 2 == 0, outer, inner)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _starfish() -> Polygon:
    angle = _angles(90) - np.pi / 2
    # Five broad, rounded arms: nothing of the star's sharp corners is left.
    radius = 0.66 + 0.36 * np.cos(5 * (angle + np.pi / 2))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _heart() -> Polygon:
    t = _angles(60)
    across = 16 * np.sin(t) ** 3
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([across, -up - 2], axis=1) / 16.5


def _drop() -> Polygon:
    t = _angles(60)
    across = 0.72 * np.sin(t) * np.sin(t / 2) ** 1.4
    return np.stack([across, -np.cos(t)], axis=1) * 1.02


def _fish() -> Outline:
    tail = np.array([(-0.45, 0.0), (-1.05, -0.6), (-1.05, 0.6)])
    return [_ellipse(0.75, 0.48, centre=(0.22, 0.0)), tail], [_ellipse(0.09, centre=(0.62, -0.12))]


def _boat() -> Outline:
    hull = np.array([(-1.0, 0.3), (1.0, 0.3), (0.6, 0.85), (-0.6, 0.85)])
    sail = np.array([(0.08, -1.0), (0.08, 0.18), (0.85, 0.18)])
    back = np.array([(-0.08, -0.7), (-0.08, 0.18), (-0.65, 0.18)])
    return [hull, sail, back], []


def _arrow() -> Outline:
    head = np.array([(0.15, -0.75), (1.0, 0.0), (0.15, 0.75)])
    return [head, _box(-0.95, -0.25, 0.25, 0.25)], []


def _moon() -> Polygon:
    """A disc of radius 1 without the part that a smaller, shifted disc covers."""
    radius, shift, direction = 0.86, 0.47, -0.26
    half_outer = np.arccos((shift**2 + 1 - radius**2) / (2 * shift))
    half_inner = np.arccos((1 - shift**2 - radius**2) / (2 * shift * radius))
    outer = direction + np.linspace(half_outer, 2 * np.pi - half_outer, 40)
    inner = direction + np.linspace(2 * np.pi - half_inner, half_inner, 40)
    centre = shift * np.array([np.cos(direction), np.sin(direction)])
    rim = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = centre + radius * np.stack([np.cos(inner), np.sin(inner)], axis=1)
    return np.concatenate([rim, bite])


def _lightning() -> Polygon:
    upper = [(0.15, -1.05), (-0.6, 0.15), (-0.05, 0.15)]
    return np.array([*upper, (-0.3, 1.05), (0.6, -0.25), (0.05, -0.25), (0.45, -1.05)])


_BUILDERS: dict[str, Callable[[], Outline]] = {
    "disc": lambda: ([_ellipse(0.92)], []),
    "square": lambda: ([_box(-0.78, -0.78, 0.78, 0.78)], []),
    "triangle": lambda: ([_regular(3, 1.05)], []),
    "heart": lambda: ([_heart()], []),
    "moon": lambda: ([_moon()], []),
    "cross": lambda: ([_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)], []),
    "arrow": _arrow,
    "ring": lambda: ([_ellipse(0.98)], [_ellipse(0.58)]),
    "star": lambda: ([_star(5, 1.05, 0.42)], []),
    "fish": _fish,
    "starfish": lambda: ([_starfish()], []),
    "boat": _boat,
    "lightning": lambda: ([_lightning()], []),
    "hexnut": lambda: ([_regular(6, 1.0)], [_ellipse(0.42)]),
    "drop": lambda: ([_drop()], []),
}
