"""An SAE on activations of one's own, in one line of Python and without a config or a trainer."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipattr.errors import ConfigError, DataError
from clipattr.sae.initial import Bias
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae
from clipattr.sae.transcoder import Transcoder
from clipattr.training.optim import warmup_hold_decay
from clipattr.training.own_rows import Columns, OwnRows, Rows
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import INIT_ROWS

WATCH_EVERY = 500
# As the trainer of the jobs has it.
LARGEST_GRADIENT = 1.0
# Then k stays: a running threshold has to follow.
ANNEALED_SHARE = 0.8


@dataclass(frozen=True)
class Training:
    """How an SAE is trained: what `fit_sae` takes by these names."""

    lr: float = 1e-3
    """peak of Adam; it falls to zero over the last fifth"""
    warmup: int = 100
    """steps until then"""
    k_aux: int | None = None
    """dead latents that model the residual; none: half the width of that"""
    aux_coefficient: float = 1 / 32
    """weight of that"""
    dead_after: int = 20_000
    """rows without firing after which a latent is dead"""
    bias: Bias = Bias.mean
    """where b_dec starts"""
    from_data: bool = False
    """latents start at rows, and not at random"""
    k_start: int | None = None
    """k of the first step, of an SAE that has a k; it falls to that linearly"""
    k_steps: int = 1000
    """steps until then, at most four fifths of the training"""
    ema: float | None = None
    """decay of a running mean of the weights, which is returned then"""

    def member_of(self, sae: Sae, steps: int) -> SaeMember:
        """The SAE in a training of so many steps."""
        k_aux = len(sae.b_dec) // 2 if self.k_aux is None else self.k_aux
        k_steps = min(self.k_steps, int(ANNEALED_SHARE * steps))
        settings = asdict(replace(self, k_aux=k_aux, k_steps=k_steps))
        return SaeMember(sae, **settings)


_OF_TRAINING = {entry.name for entry in fields(Training)}


def fit_sae(
    rows: Rows,
    sae: Sae | type[Sae] = TopKSae,
    *,
    targets: Tensor | None = None,
    steps: int | None = None,
    epochs: int = 10,
    batch_size: int = 1024,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    watch: Callable[[int, Sae], object] | None = None,
    watch_every: int | None = None,
    **settings: Any,
) -> Sae:
    """Train an SAE on rows of activations, and return it in eval mode.

        sae = fit_sae(rows, k=32, n_latents=4096)
        transcoder = fit_sae(rows, Transcoder, targets=targets, k=32, n_latents=4096, skip=True)

    The steps are those of the job `train_sae`, which also caches, resumes and uses many GPUs.

    Args:
        rows: a tensor [n, d], shuffled in every epoch; or an iterable of such tensors (or what
            returns one), taken as they come and begun anew at the end. For a transcoder, parts are
            pairs of such tensors, rows and their targets.
        sae: an architecture, built with `settings`; or an SAE, trained from its own directions.
        targets: what a transcoder makes of a tensor of rows: a tensor with as many.
        steps: of the optimiser; instead of `epochs`, for which an iterable is read once to count.
        epochs: passes over the rows; batches are full, so one may end within a batch.
        batch_size: rows per step.
        seed: of the directions and of the order of a tensor.
        device: where it is trained.
        progress: show a bar.
        watch: called with the number of steps done and a copy of the SAE as it would be returned
            if training ended there; it changes nothing.
        watch_every: steps between two calls, of which there is one at least; 500 if not given.
        **settings: fields of `Training` (lr, warmup, ...), and what the architecture takes
            (k, n_latents, ...).
    """
    training = Training(**{name: settings.pop(name) for name in _OF_TRAINING & settings.keys()})
    kind = sae if isinstance(sae, type) else type(sae)
    source = OwnRows(rows, targets, is_pair=issubclass(kind, Transcoder))
    steps = source.count_steps(steps, epochs, batch_size)
    every = _check_watch(watch, watch_every, steps)
    batches = source.batches(batch_size, seed)
    # What the start is measured on is trained on as well: a stream may be read once only.
    first = list(islice(batches, min(steps, -(-INIT_ROWS // batch_size))))
    start = [torch.cat(column)[:INIT_ROWS] for column in zip(*first, strict=True)]
    model = _build(sae, [column.shape[1] for column in start], seed, settings).to(device).train()
    member = training.member_of(model, steps).to(device)
    member.initialise_from(*(column.to(device) for column in start))
    due = islice(chain(first, batches), steps)
    bar = tqdm(due, total=steps, unit="step", disable=not progress)
    for done in _train(member, iter(bar), steps):
        if watch is not None and done % every == 0:
            watch(done, member.snapshot())
    return member.finish()


def _check_watch(
    watch: Callable[[int, Sae], object] | None, watch_every: int | None, steps: int
) -> int:
    """Steps between two calls; ConfigError where there would be none."""
    if watch is None and watch_every is not None:
        raise ConfigError(f"fit_sae: watch_every={watch_every} without watch, which it would call")
    every = WATCH_EVERY if watch_every is None else watch_every
    if watch is not None and not 1 <= every <= steps:
        raise ConfigError(
            f"fit_sae: watch_every={every} with {steps} steps: watch would never be called; give a "
            f"watch_every of 1 to {steps}"
        )
    return every


def _train(member: SaeMember, batches: Iterator[Columns], steps: int) -> Iterator[int]:
    """What `SaeModule` does with one member, on one device; gives the number of steps done."""
    optimizer = torch.optim.Adam(member.sae.parameters(), lr=member.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_hold_decay(member.warmup, steps))
    for step, columns in enumerate(batches):
        member.anneal(step)
        output, loss, _ = member(*(column.to(member.sae.W_enc) for column in columns))
        member.take_in(output, 1)
        loss.total.backward()
        member.remove_parallel_gradient()
        if not (member.clip_gradient(LARGEST_GRADIENT) and loss.total.isfinite()):
            is_broken = torch.stack([(~one.isfinite()).any(dim=1) for one in columns]).any(dim=0)
            raise DataError(
                f"fit_sae: the loss or its gradient is not finite at step {step} of {steps}; "
                f"{int(is_broken.sum())} of its {len(is_broken)} rows hold nan or "
                "infinity; if there are none, a lower lr may help"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        member.after_step()
        yield step + 1


def _build(sae: Sae | type[Sae], widths: list[int], seed: int, settings: dict[str, Any]) -> Sae:
    if isinstance(sae, Sae):
        if settings:
            raise ConfigError(
                f"fit_sae: {', '.join(settings)} given beside a {type(sae).__name__} that has its "
                "settings; give the class instead, or no settings"
            )
        if sae.d_model != widths[0]:
            raise DataError(
                f"fit_sae: rows of {widths[0]} numbers for an SAE with d_model={sae.d_model}"
            )
        if isinstance(sae, Transcoder) and sae.d_out != widths[1]:
            raise DataError(
                f"fit_sae: targets of {widths[1]} numbers for a transcoder with d_out={sae.d_out}"
            )
        return sae
    sizes = dict(zip(("d_model", "d_out"), widths, strict=False))
    return sae(**sizes, generator=torch.Generator().manual_seed(seed), **settings)
