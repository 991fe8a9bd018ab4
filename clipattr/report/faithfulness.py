"""Deletion and insertion curves of attribution methods with their bands, as a picture."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MUTED = "#8a94a0"
# Two colours that differ for everybody; what is compared with them stays thin.
_STYLES: dict[str, tuple[str, str, float]] = {
    "attribution_patching": ("#0072b2", "solid", 2.6),
    "logit_lens": ("#d55e00", "solid", 2.6),
    "exact": ("#20262e", "dashed", 1.3),
    "integrated_gradients": ("#009e73", "dotted", 1.8),
    "act_times_logit_lens": ("#cc79a7", "dashdot", 1.3),
    "energy": ("#e69f00", "dashed", 1.2),
    "random": (_MUTED, "solid", 1.1),
}
# Of a normal distribution, within which 95 % lie.
_Z = 1.96


class Curve(NamedTuple):
    """Mean score after each step, and its standard error over images."""

    mean: Sequence[float]
    error: Sequence[float]


class MethodCurves(NamedTuple):
    """Both curves of a method."""

    name: str
    deletion: Curve
    insertion: Curve


def faithfulness_png(methods: Sequence[MethodCurves], n_images: int) -> bytes:
    """Two panels, one line per method; the band is the mean +- 1.96 standard errors."""
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, which in ((left, "deletion"), (right, "insertion")):
            for method in methods:
                color, dash, width = _STYLES[method.name]
                mean, error = (np.asarray(each) for each in getattr(method, which))
                steps = np.arange(len(mean))
                label = method.name.replace("_", " ")
                axes.plot(steps, mean, color=color, linestyle=dash, linewidth=width, label=label)
                low, high = mean - _Z * error, mean + _Z * error
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set_xlabel(f"latents {'deleted' if which == 'deletion' else 'inserted'}")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y", color=_MUTED, alpha=0.3, linewidth=0.7)
            axes.margins(x=0.02)
        left.set_ylabel(f"mean score of {n_images:,} images")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
