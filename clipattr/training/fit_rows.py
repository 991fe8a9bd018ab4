"""An SAE on activations of one's own, in one line of Python and without a config or a trainer."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from clipattr.errors import ConfigError, DataError
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae
from clipattr.training.optim import warmup_hold_decay
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import INIT_ROWS

Rows = Tensor | Iterable[Tensor] | Callable[[], Iterable[Tensor]]

# As the trainer of the jobs has it.
LARGEST_GRADIENT = 1.0
AGAIN = (
    "give a list, a DataLoader or another iterable that begins anew each time, a callable that "
    "returns a fresh iterator, or fewer steps"
)


def fit_sae(
    rows: Rows,
    sae: Sae | type[Sae] = TopKSae,
    *,
    steps: int | None = None,
    epochs: int = 10,
    batch_size: int = 1024,
    lr: float = 1e-3,
    warmup: int = 100,
    k_aux: int | None = None,
    aux_coefficient: float = 1 / 32,
    dead_after: int = 20_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    **settings: Any,
) -> Sae:
    """Train an SAE on rows of activations, and return it in eval mode.

        sae = fit_sae(rows, k=32, n_latents=4096)

    The steps are those of the job `train_sae`, which also caches, resumes and uses many GPUs.

    Args:
        rows: a tensor [n, d], shuffled in every epoch; or an iterable of such tensors (or what
            returns one), taken as they come and begun anew at the end.
        sae: an architecture, built with `settings`; or an SAE, trained from its own directions.
        steps: of the optimiser; instead of `epochs`, for which an iterable is read once to count.
        epochs: passes over the rows; batches are full, so one may end within a batch.
        batch_size: rows per step.
        lr: peak of Adam; it falls to zero over the last fifth.
        warmup: steps until then.
        k_aux: dead latents that model the residual; none: d / 2.
        aux_coefficient: weight of that.
        dead_after: rows without firing after which a latent is dead.
        seed: of the directions and of the order of a tensor.
        device: where it is trained.
        progress: show a bar.
        **settings: of the architecture: k, n_latents, ...
    """
    steps = _count_steps(rows, steps, epochs, batch_size)
    parts = _parts_without_end(rows, seed)
    batches = _batches(parts, batch_size)
    # What the start is measured on is trained on as well: a stream may be read once only.
    first = list(islice(batches, min(steps, -(-INIT_ROWS // batch_size))))
    start = torch.cat(first)[:INIT_ROWS]
    model = _build(sae, start.shape[1], seed, settings).to(device).train()
    member = SaeMember(
        model,
        lr=lr,
        warmup=warmup,
        k_aux=start.shape[1] // 2 if k_aux is None else k_aux,
        aux_coefficient=aux_coefficient,
        dead_after=dead_after,
    ).to(device)
    member.initialise_from(start.to(device))
    due = islice(chain(first, batches), steps)
    bar = tqdm(due, total=steps, unit="step", disable=not progress)
    _train(member, iter(bar), steps)
    return model.eval()


def _train(member: SaeMember, batches: Iterator[Tensor], steps: int) -> None:
    """What `SaeModule` does with one member, on one device."""
    optimizer = torch.optim.Adam(member.sae.parameters(), lr=member.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_hold_decay(member.warmup, steps))
    for step, rows in enumerate(batches):
        output, loss, _ = member(rows.to(member.sae.W_enc))
        member.take_in(output, 1)
        loss.total.backward()
        member.remove_parallel_gradient()
        if not (member.clip_gradient(LARGEST_GRADIENT) and loss.total.isfinite()):
            raise DataError(
                f"fit_sae: the loss or its gradient is not finite at step {step} of {steps}; "
                f"{int((~rows.isfinite()).any(dim=1).sum())} of its {len(rows)} rows hold nan or "
                "infinity; if there are none, a lower lr may help"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        member.normalise_decoder()


def _build(sae: Sae | type[Sae], width: int, seed: int, settings: dict[str, Any]) -> Sae:
    if isinstance(sae, Sae):
        if settings:
            raise ConfigError(
                f"fit_sae: {', '.join(settings)} given beside a {type(sae).__name__} that has its "
                "settings; give the class instead, or no settings"
            )
        if sae.d_model != width:
            raise DataError(
                f"fit_sae: rows of {width} numbers for an SAE with d_model={sae.d_model}"
            )
        return sae
    return sae(d_model=width, generator=torch.Generator().manual_seed(seed), **settings)


def _count_steps(rows: Rows, steps: int | None, epochs: int, batch_size: int) -> int:
    if steps is None:
        if isinstance(rows, Iterator):
            raise ConfigError(
                f"fit_sae: {type(rows).__name__} can be read once only, so that epochs cannot be "
                f"counted: give steps, or {AGAIN}"
            )
        in_memory = isinstance(rows, Tensor)
        n_rows = len(rows) if in_memory else sum(len(part) for part in _one_pass(rows))
        steps = epochs * n_rows // batch_size
    if min(steps, batch_size) < 1:
        raise ConfigError(
            f"fit_sae: {steps} steps of {batch_size} rows; both must be at least 1 "
            "(with epochs, there must be at least batch_size rows in all of them)"
        )
    return steps


def _parts_without_end(rows: Rows, seed: int) -> Iterator[Float[Tensor, "part model"]]:
    """One epoch after the other."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        n_rows = 0
        for part in _shuffled(rows, generator) if isinstance(rows, Tensor) else _one_pass(rows):
            n_rows += len(part)
            yield part
        if not n_rows:
            raise DataError(_nothing_left(rows, epoch))


def _shuffled(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    _check(rows, None)
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    for chosen in order.split(INIT_ROWS):
        yield rows[chosen]


def _one_pass(rows: Iterable[Tensor] | Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    width = None
    for part in rows() if callable(rows) else rows:
        width = _check(part, width)
        yield part


def _nothing_left(rows: Rows, epoch: int) -> str:
    if epoch == 0:
        return f"fit_sae: there are no rows in this {type(rows).__name__}"
    return (
        f"fit_sae: {type(rows).__name__} is used up after {epoch} pass{'es' * (epoch > 1)} and "
        f"gives no more rows, but more are needed: {AGAIN}"
    )


def _check(part: object, width: int | None) -> int:
    is_rows = isinstance(part, Tensor) and part.dim() == 2 and part.is_floating_point()
    if not isinstance(part, Tensor) or not is_rows or part.shape[1] != (width or part.shape[1]):
        found = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part)
        raise DataError(
            f"fit_sae: rows gave {found}; every part must be a floating-point tensor "
            f"[n, {width or 'd'}]"
        )
    return part.shape[1]


def _batches(parts: Iterator[Tensor], size: int) -> Iterator[Float[Tensor, "batch model"]]:
    """The same rows, `size` at a time."""
    held: list[Tensor] = []
    n_held = 0
    for part in parts:
        held.append(part)
        n_held += len(part)
        if n_held >= size:
            rows = torch.cat(held)
            *full, rest = rows.tensor_split(tuple(range(size, n_held + 1, size)))
            yield from full
            held, n_held = [rest], len(rest)
