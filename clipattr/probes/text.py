"""Probes that start from a text head, and the line from the head to the probe.

Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), 2022.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.errors import ConfigError
from clipattr.probes.linear import LinearProbe
from clipattr.probes.selection import score


@torch.no_grad()
def text_probe(rows: Float[Tensor, "class embed"], logit_scale: float) -> LinearProbe:
    """The probe whose logits are those of the text head, logit_scale t_c . f, for training on."""
    probe = LinearProbe(rows.shape[1], len(rows))
    probe.weight.copy_(logit_scale * rows)
    return probe


@torch.no_grad()
def interpolate(start: LinearProbe, end: LinearProbe, alpha: float) -> LinearProbe:
    """(1 - alpha) start + alpha end, of weights as of logits."""
    if start.weight.shape != end.weight.shape:
        raise ConfigError(
            f"probes of the shapes {list(start.weight.shape)} and {list(end.weight.shape)}: "
            "between equal ones alone there is a line"
        )
    probe = LinearProbe(start.weight.shape[1], len(start.weight))
    probe.weight.copy_(start.weight.lerp(end.weight, alpha))
    probe.bias.copy_(start.bias.lerp(end.bias, alpha))
    return probe


@torch.no_grad()
def interpolation_scores(
    start: LinearProbe,
    end: LinearProbe,
    alphas: Sequence[float],
    features: Float[Tensor, "row embed"],
    labels: Int[Tensor, " row"],
    criterion: str = "accuracy",
    groups: Int[Tensor, " row"] | None = None,
) -> list[float]:
    """Of `interpolate` at each alpha, for `selection.best`; features are read twice in all."""
    first, last = start(features), end(features)
    return [
        score(first.lerp(last, alpha).argmax(dim=1), labels, criterion, groups) for alpha in alphas
    ]
