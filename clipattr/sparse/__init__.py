"""Top-k, sums over bags of rows, and dot products: what sparse codes cost, on every device.

`kernels_for(tensor)` has the three functions for the device of a tensor. On the CPU they are
torch's own (`eager`), on CUDA Triton kernels, if they pass a check (`choice`). What Triton compiles
is marked `no_type_check`: the tests' run-time checks of shapes must not get into it.
"""

from clipattr.sparse.choice import Kernels, gathered, kernels_for

__all__ = ["Kernels", "gathered", "kernels_for"]
