"""Proof that an evaluation saw every row exactly once, whatever the number of processes."""

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.errors import DataError


class ExactOnce(Metric):
    """Counts the rows that were seen and adds up their hashes; `compute` compares with what is due.

    The processes exchange two numbers and no row. A lost row changes the count; a lost one and a
    doubled one leave it, but change the sum modulo 2^64, except with a probability of about 2^-64.
    """

    full_state_update = False
    n_rows: Tensor
    hashes: Tensor

    def __init__(self, expected: Int[Tensor, " row"], *, sync_on_compute: bool = True) -> None:
        """The numbers of all rows that are due, over all processes, each once."""
        super().__init__(sync_on_compute=sync_on_compute)
        self.n_expected = len(expected)
        self.expected_hashes = int(_hash(expected).sum())
        zero = torch.zeros((), dtype=torch.int64)
        self.add_state("n_rows", zero, dist_reduce_fx="sum")
        self.add_state("hashes", zero.clone(), dist_reduce_fx="sum")

    def update(self, rows: Int[Tensor, " batch"]) -> None:
        """Note the rows of a batch."""
        self.n_rows += len(rows)
        self.hashes += _hash(rows).sum().to(self.hashes.device)

    def compute(self) -> int:
        """The number of rows; DataError if one was lost, doubled or is not due."""
        n_rows = int(self.n_rows)
        if n_rows != self.n_expected:
            raise DataError(f"the evaluation saw {n_rows} rows, {self.n_expected} are due")
        if int(self.hashes) != self.expected_hashes:
            raise DataError(
                f"the evaluation saw {n_rows} rows, as many as are due, but not the same ones: "
                "some were lost and others were seen more than once"
            )
        return n_rows


def _hash(numbers: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """splitmix64, a bijection of 64-bit integers (Steele, Lea and Flood 2014)."""
    mixed = numbers.long() + 1
    mixed = mixed * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # >> keeps the sign; the mask makes it the unsigned shift.
        mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor
    return mixed
