"""An explanation as plain numbers, and as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from clipattr.attribution.explanation import Explanation


class Part(NamedTuple):
    """What one latent, or the error term, has in a score; shares are None where they divide by 0.

    `share` is of the sum of |attribution| over all latents, `share_of_change` of what the latents
    change together: y(x) - y(rest).
    """

    attribution: float
    share: float | None
    share_of_change: float | None
    exact: float


Grid = list[list[float]]
"""a number per patch, rows of the image first"""


class FiredBy(NamedTuple):
    """From where the class token read what made a latent fire.

    Together its activation before the non-linearity, which is the activation of most kinds of SAE.
    """

    patches: Grid
    other_tokens: float
    nothing: float
    """what the latent would be if nothing had been read"""


class Meaning(NamedTuple):
    """What an atlas says of a latent: words with their scores, and images, best first."""

    labels: Sequence[tuple[str, float]]
    examples: Sequence[int]
    """rows of the images that the atlas was made from"""

    @property
    def word(self) -> str:
        """The best label; "-" of a latent that fired on no image of the atlas."""
        return self.labels[0][0] if self.labels else "-"


class LatentPart(NamedTuple):
    """One latent; `heatmap` is its attribution at each patch, where the site has patches."""

    latent: int
    activation: float
    part: Part
    heatmap: Grid | None
    fired_by: FiredBy | None
    meaning: Meaning | None

    @property
    def name(self) -> str:
        """Its number, and its best label where there is an atlas."""
        return f"{self.latent} {self.meaning.word}" if self.meaning else str(self.latent)

    def to_json(self) -> dict[str, object]:
        """Plain fields; what is not known of the latent is left out."""
        found: dict[str, object] = {"latent": self.latent, "activation": self.activation}
        found |= self.part._asdict()
        if self.heatmap is not None:
            found["heatmap"] = self.heatmap
        if self.fired_by is not None:
            found["fired_by"] = self.fired_by._asdict()
        if self.meaning is not None:
            labels = [{"word": word, "score": score} for word, score in self.meaning.labels]
            found |= {"labels": labels, "examples": list(self.meaning.examples)}
        return found


class Known(NamedTuple):
    """What is known of latents beside their attribution, by their number."""

    fired_by: Mapping[int, FiredBy] = {}
    meaning: Mapping[int, Meaning] = {}


class ExplainedScore(NamedTuple):
    """One score and all that is said about it."""

    name: str
    score: float
    without_latents: float
    n_active: int
    sum_of_sizes: float
    others: float
    """attribution of the latents that are not listed, together"""
    error: Part
    latents: list[LatentPart]

    def to_json(self) -> dict[str, object]:
        """Plain fields, as files record them."""
        latents = [each.to_json() for each in self.latents]
        return {**self._asdict(), "error": self.error._asdict(), "latents": latents}


class Patches(NamedTuple):
    """The patches among the tokens of a site, and their rows and columns in the image."""

    first: int
    grid: tuple[int, int]


def read_explanation(
    explanation: Explanation,
    names: Sequence[str],
    patches: Patches | None,
    known: Known = Known(),  # noqa: B008  immutable
) -> list[ExplainedScore]:
    """One entry per row of the explanation; heatmaps where the site has patches."""
    maps = None if patches is None else _on_grid(explanation.maps(), patches)
    return [_read_row(explanation, row, name, maps, known) for row, name in enumerate(names)]


def explanation_table(found: ExplainedScore) -> str:
    """The listed latents, the others and the error term, a line each."""
    has_labels = any(each.meaning for each in found.latents)
    lines = [
        f"{found.name}: {found.score:.4f}, without its {found.n_active} active latents "
        f"{found.without_latents:.4f}",
        f"  {'latent':>9} {'attribution':>12} {'of all |.|':>10} {'of change':>10} "
        f"{'activation':>11} {'exact':>9}" + ("  label" if has_labels else ""),
    ]
    for each in found.latents:
        line = _line(str(each.latent), each.part, f"{each.activation:.3f}")
        lines.append(f"{line}  {each.meaning.word}" if each.meaning else line)
    n_others = found.n_active - len(found.latents)
    if n_others:
        lines.append(f"  {f'{n_others} more':>9} {found.others:>+12.4f}")
    return "\n".join([*lines, _line("error", found.error, "")])


def _line(name: str, part: Part, activation: str) -> str:
    shares = [
        "-" if share is None else f"{100 * share:+.1f} %"
        for share in (part.share, part.share_of_change)
    ]
    return (
        f"  {name:>9} {part.attribution:>+12.4f} {shares[0]:>10} {shares[1]:>10} "
        f"{activation:>11} {part.exact:>+9.4f}"
    )


def _read_row(
    explanation: Explanation, row: int, name: str, maps: np.ndarray | None, known: Known
) -> ExplainedScore:
    is_active = explanation.is_active[row]
    score, rest = float(explanation.score[row]), float(explanation.without_latents[row])
    of_slots = explanation.attribution[row].double()
    total = float(of_slots.abs().sum())
    slots, exact = explanation.top[row][is_active], explanation.exact[row][is_active]
    numbers, activations = explanation.latents[row], explanation.activations[row]
    latents = [
        LatentPart(
            latent,
            activation,
            _part(attribution, effect, total, score - rest),
            None if maps is None else maps[row, rank].tolist(),
            known.fired_by.get(latent),
            known.meaning.get(latent),
        )
        for rank, (latent, activation, attribution, effect) in enumerate(
            zip(
                numbers[is_active].tolist(),
                activations[is_active].tolist(),
                of_slots[slots].tolist(),
                exact.tolist(),
                strict=True,
            )
        )
    ]
    error, error_exact = float(explanation.error[row]), float(explanation.error_exact[row])
    return ExplainedScore(
        name=name,
        score=score,
        without_latents=rest,
        n_active=int(explanation.merged.codes.is_active[row].sum()),
        sum_of_sizes=total,
        others=float(of_slots.sum() - of_slots[slots].sum()),
        error=_part(error, error_exact, total, score - rest),
        latents=latents,
    )


def _part(attribution: float, exact: float, total: float, change: float) -> Part:
    share = attribution / total if total else None
    return Part(attribution, share, attribution / change if change else None, exact)


def _on_grid(maps: Tensor, patches: Patches) -> np.ndarray:
    return maps[:, :, patches.first :].unflatten(2, patches.grid).double().cpu().numpy()
