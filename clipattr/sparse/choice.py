"""Which kernels a device uses: torch's own on the CPU, Triton's on CUDA if they pass a check.

The environment variable CLIPATTR_KERNELS is read once: `auto` (the default) takes torch's own, with
a warning, where Triton's fail; `triton` makes that an error; `eager` never asks for Triton.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.errors import ConfigError
from clipattr.sparse import eager

logger = logging.getLogger(__name__)

VARIABLE = "CLIPATTR_KERNELS"
SETTINGS = ("auto", "eager", "triton")


class Kernels(NamedTuple):
    """Three functions; `eager` says what they compute."""

    top_k: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    sum_bags: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    dot: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


EAGER = Kernels(eager.top_k, eager.sum_bags, eager.dot)


def kernels_for(tensor: Tensor) -> Kernels:
    """The kernels of the device on which the tensor is."""
    return _of_device(tensor.device) if tensor.is_cuda else EAGER


def gathered(matrix: Float[Tensor, "place width"]) -> Float[Tensor, "place width"]:
    """The matrix as its rows are read: under autocast in half precision, as for other products.

    Triton's kernels still add in float32. Torch's own add in the precision of what they read, so
    that there the matrix stays as it is.
    """
    kind = matrix.device.type
    is_halved = matrix.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    if not is_halved or kernels_for(matrix) is EAGER:
        return matrix
    return matrix.to(torch.get_autocast_dtype(kind))


@functools.cache
def _of_device(device: torch.device) -> Kernels:
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ConfigError(f"{VARIABLE}={setting}: allowed are {', '.join(SETTINGS)}")
    if setting == "eager":
        return EAGER
    try:
        from clipattr.sparse import check

        found = check.TRITON
        fault = check.difference(found, EAGER, device)
    # Compilers, drivers and packages fail in more ways than can be listed.
    except Exception as error:  # noqa: BLE001
        found, fault = EAGER, f"{type(error).__name__}: {error}"
    if fault is None:
        return found
    if setting == "triton":
        raise ConfigError(f"{VARIABLE}=triton, but on {device} {fault}")
    logger.warning(
        "Triton kernels are not used on %s: %s. Torch's own are, which are slower; "
        "%s=eager asks for them without this warning",
        device,
        fault,
        VARIABLE,
    )
    return EAGER
