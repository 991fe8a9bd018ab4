"""Rows that somebody brings, in any form, as batches without end."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from clipattr.errors import ConfigError, DataError

Parts = Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]]
Rows = Tensor | Parts | Callable[[], Parts]
# A part of the rows, or a batch: x, and y where another site is reconstructed.
Columns = tuple[Tensor, ...]

SHUFFLED_ROWS = 8192
AGAIN = (
    "give a list, a DataLoader or another iterable that begins anew each time, a callable that "
    "returns a fresh iterator, or fewer steps"
)


class OwnRows:
    """A tensor, shuffled in every epoch, or parts, taken as they come and begun anew at the end."""

    def __init__(self, rows: Rows, targets: Tensor | None, *, is_pair: bool) -> None:
        """With `is_pair` there are targets: beside a tensor, or in every part."""
        _check_targets(rows, targets, is_pair)
        self._rows = rows
        self._targets = targets
        self._is_pair = is_pair

    def count_steps(self, steps: int | None, epochs: int, batch_size: int) -> int:
        """The steps themselves, or those of so many passes."""
        rows = self._rows
        if steps is None:
            if isinstance(rows, Iterator):
                raise ConfigError(
                    f"fit_sae: {type(rows).__name__} can be read once only, so that epochs cannot "
                    f"be counted: give steps, or {AGAIN}"
                )
            in_memory = isinstance(rows, Tensor)
            n_rows = len(rows) if in_memory else sum(len(part[0]) for part in self._one_pass(rows))
            steps = epochs * n_rows // batch_size
        if min(steps, batch_size) < 1:
            raise ConfigError(
                f"fit_sae: {steps} steps of {batch_size} rows; both must be at least 1 "
                "(with epochs, there must be at least batch_size rows in all of them)"
            )
        return steps

    def batches(self, size: int, seed: int) -> Iterator[Columns]:
        """The rows, `size` at a time; the seed decides how a tensor is shuffled."""
        held: list[Columns] = []
        n_held = 0
        for part in self._parts(seed):
            held.append(part)
            n_held += len(part[0])
            if n_held >= size:
                borders = tuple(range(size, n_held + 1, size))
                columns = [torch.cat(column) for column in zip(*held, strict=True)]
                pieces = zip(*(column.tensor_split(borders) for column in columns), strict=True)
                *full, rest = pieces
                yield from full
                held, n_held = [rest], len(rest[0])

    def _parts(self, seed: int) -> Iterator[Columns]:
        """One epoch after the other."""
        rows, generator = self._rows, torch.Generator().manual_seed(seed)
        for epoch in count():
            n_rows = 0
            parts = (
                self._shuffled(rows, generator)
                if isinstance(rows, Tensor)
                else self._one_pass(rows)
            )
            for part in parts:
                n_rows += len(part[0])
                yield part
            if not n_rows:
                raise DataError(_nothing_left(rows, epoch))

    def _shuffled(self, rows: Tensor, generator: torch.Generator) -> Iterator[Columns]:
        columns = (rows,) if self._targets is None else (rows, self._targets)
        _check(columns, None)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(SHUFFLED_ROWS):
            yield tuple(column[chosen.to(column.device)] for column in columns)

    def _one_pass(self, rows: Parts | Callable[[], Parts]) -> Iterator[Columns]:
        parts: Iterable[Any] = rows() if callable(rows) else rows
        widths = None
        for part in parts:
            columns = _as_pair(part) if self._is_pair else (part,)
            widths = _check(columns, widths)
            yield columns


def _check_targets(rows: Rows, targets: Tensor | None, is_pair: bool) -> None:
    if targets is None:
        if is_pair and isinstance(rows, Tensor):
            raise ConfigError(
                "fit_sae: a transcoder needs targets, a tensor with one row for each of rows"
            )
        return
    if not is_pair:
        raise ConfigError(
            "fit_sae: targets are for a Transcoder; every other SAE reconstructs the rows"
        )
    if not isinstance(rows, Tensor):
        raise ConfigError(
            f"fit_sae: targets beside a {type(rows).__name__}; they go with a tensor of rows, and "
            "what gives parts gives pairs of tensors: rows and their targets"
        )


def _as_pair(part: Any) -> Columns:
    if not isinstance(part, tuple | list) or len(part) != 2:
        found = f"{len(part)} of them" if isinstance(part, tuple | list) else _describe(part)
        raise DataError(
            f"fit_sae: rows gave {found}; for a transcoder every part must be a pair of tensors, "
            "rows and their targets"
        )
    return tuple(part)


def _check(columns: tuple[Any, ...], widths: list[int] | None) -> list[int]:
    names = ("rows", "targets")[: len(columns)]
    for name, column, width in zip(names, columns, widths or [None, None], strict=False):
        is_rows = isinstance(column, Tensor) and column.dim() == 2 and column.is_floating_point()
        if not is_rows or column.shape[1] != (width or column.shape[1]):
            raise DataError(
                f"fit_sae: {name} gave {_describe(column)}; every part must be a floating-point "
                f"tensor [n, {width or 'd'}]"
            )
    if len(columns[-1]) != len(columns[0]):
        raise DataError(
            f"fit_sae: {len(columns[0])} rows and {len(columns[1])} targets; there must be one "
            "target for each row"
        )
    return [column.shape[1] for column in columns]


def _describe(part: object) -> str:
    return f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else str(type(part))


def _nothing_left(rows: Rows, epoch: int) -> str:
    if epoch == 0:
        return f"fit_sae: there are no rows in this {type(rows).__name__}"
    return (
        f"fit_sae: {type(rows).__name__} is used up after {epoch} pass{'es' * (epoch > 1)} and "
        f"gives no more rows, but more are needed: {AGAIN}"
    )
