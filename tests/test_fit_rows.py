"""fit_sae: the steps of SaeModule, on whatever gives rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clipattr.errors import ConfigError, DataError
from clipattr.sae import BatchTopKSae, GatedSae, TopKSae
from clipattr.sae.sae import Sae
from clipattr.training import fit_rows, fit_sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.streams import Place
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.test_training import N_STEPS, activations, settings

HOW = {"lr": 1e-2, "warmup": 3, "k_aux": 4, "aux_coefficient": 0.1, "dead_after": 32}
SMALL = {"k": 3, "n_latents": 24, "batch_size": 32}


class Recorded(ActivationDataModule):
    """Keeps what it served, and starts from the first of it, as whoever has a stream alone."""

    def first_rows(self, n_rows: int) -> tuple[Tensor, ...]:
        place = Place(rank=0, world_size=1, local_world_size=1, pin_memory=False)
        self.served = [x.clone() for (x,) in self.open_stream(place)]
        return (torch.cat(self.served)[:n_rows],)


def small_sae(kind: type[Sae]) -> Sae:
    rest = {"sparsity": 1e-3} if kind is GatedSae else {"k": 3}
    return kind(d_model=8, n_latents=64, generator=torch.Generator().manual_seed(1), **rest)


@pytest.mark.parametrize("kind", [TopKSae, BatchTopKSae, GatedSae])
def test_same_bits_as_the_module(kind: type[Sae], tmp_path: Path):
    data = Recorded(
        lambda _: store_of(activations(), tmp_path / "store"),
        batch_size=32,
        seed=0,
        n_steps=N_STEPS,
    )
    module = SaeModule({"": SaeMember(small_sae(kind), **HOW)}, n_steps=N_STEPS)
    fit(build_trainer(settings(), tmp_path), module, data, tmp_path)
    # Other parts than batches, and the generator of a stream that is read once.
    parts = iter(torch.cat(data.served).split(50))
    ours = fit_sae(parts, small_sae(kind), steps=N_STEPS, batch_size=32, **HOW)
    theirs = module.by_name[""].sae.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert not ours.training


def planted(n_rows: int, seed: int) -> Tensor:
    """Two of 16 orthogonal atoms in every row: what k=2 explains."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(99))).Q
    chosen = torch.rand(n_rows, 16, generator=generator).topk(2).indices
    sizes = 1 + torch.rand(n_rows, 2, generator=generator)
    return torch.zeros(n_rows, 16).scatter(1, chosen, sizes) @ atoms + 3


@torch.no_grad()
def fvu(sae: Sae, rows: Tensor) -> float:
    error = (rows - sae(rows).recon).square().sum()
    return float(error / (rows - rows.mean(0)).square().sum())


def test_one_line_learns_what_is_planted():
    sae = fit_sae(planted(4096, 0), k=2, n_latents=32, epochs=60, batch_size=256, lr=1e-2, seed=3)
    held_out = planted(2000, 1)
    assert fvu(sae, held_out) < 0.03
    untrained = TopKSae(d_model=16, n_latents=32, k=2)
    untrained.initialise_from(held_out)
    assert fvu(untrained, held_out) > 0.5


def test_seed_decides():
    rows = activations()
    one, same, other = (fit_sae(rows, seed=seed, epochs=2, **SMALL) for seed in (0, 0, 1))
    assert torch.equal(one.W_enc, same.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)
    # Of rows in their own order, the seed decides where the directions start.
    zero, one = (fit_sae([rows], seed=seed, steps=2, **SMALL) for seed in (0, 1))
    assert not torch.equal(zero.W_enc, one.W_enc)


def test_a_tensor_is_shuffled_and_an_iterable_is_not():
    rows = activations()
    tensor = fit_sae(rows, steps=6, **SMALL)
    parts = fit_sae([rows], steps=6, **SMALL)
    assert not torch.equal(tensor.W_enc, parts.W_enc)
    generator = torch.Generator().manual_seed(0)
    shuffled = [rows[torch.randperm(200, generator=generator)]]
    same = fit_sae(shuffled, steps=6, **SMALL)
    assert torch.equal(tensor.W_enc, same.W_enc)


class Loader:
    """Begins anew, and counts how often."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.n_passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.n_passes += 1
        return iter(self.rows.split(48))


def test_epochs_of_an_iterable():
    rows = activations()
    loader = Loader(rows)
    epochs = fit_sae(loader, epochs=3, **SMALL)
    assert loader.n_passes == 1 + 3  # counted once
    asked: list[int] = []

    def fresh() -> Iterator[Tensor]:
        asked.append(len(asked))
        return iter(rows.half().split(17))

    steps = fit_sae(fresh, steps=3 * 200 // 32, **SMALL)
    assert len(asked) == 3
    exact = fit_sae([rows.half().float()], epochs=3, **SMALL)
    assert torch.equal(steps.W_enc, exact.W_enc)
    assert torch.equal(epochs.W_enc, fit_sae([rows], epochs=3, **SMALL).W_enc)


def test_what_is_used_up_says_so():
    parts = activations().split(50)
    fit_sae((part for part in parts), steps=6, **SMALL)
    with pytest.raises(DataError, match=r"generator is used up after 1 pass and .* fresh iterator"):
        fit_sae((part for part in parts), steps=7, **SMALL)
    with pytest.raises(ConfigError, match="generator can be read once only"):
        fit_sae((part for part in parts), epochs=1, **SMALL)
    spent = iter(parts)
    with pytest.raises(DataError, match="function is used up after 1 pass and"):
        fit_sae(lambda: spent, steps=7, **SMALL)
    with pytest.raises(DataError, match="no rows in this list"):
        fit_sae([], steps=1, **SMALL)


def test_what_is_no_rows_says_so():
    rows = activations()
    with pytest.raises(DataError, match=r"rows gave <class 'list'>.*\[n, d\]"):
        fit_sae(DataLoader(TensorDataset(rows), batch_size=50), **SMALL)
    with pytest.raises(DataError, match=r"float32 \[200\]"):
        fit_sae(rows[:, 0], **SMALL)
    with pytest.raises(DataError, match=r"int64 \[200, 8\]"):
        fit_sae(rows.long(), **SMALL)
    with pytest.raises(DataError, match=r"float32 \[200, 7\].*\[n, 8\]"):
        fit_sae([rows, rows[:, :7]], **SMALL)
    with pytest.raises(ConfigError, match="0 steps of 1024 rows"):
        fit_sae(rows, epochs=5, k=3, n_latents=24)


def test_settings_and_an_sae_do_not_go_together():
    with pytest.raises(ConfigError, match="k given beside a TopKSae"):
        fit_sae(activations(), small_sae(TopKSae), steps=1, k=3, batch_size=32)
    with pytest.raises(DataError, match="rows of 7 numbers .* d_model=8"):
        fit_sae(activations()[:, :7], small_sae(TopKSae), steps=1, batch_size=32)


def test_broken_rows_stop_the_training(monkeypatch: pytest.MonkeyPatch):
    # The start is measured on finite rows.
    monkeypatch.setattr(fit_rows, "INIT_ROWS", 64)
    rows = activations()
    rows[150, 2] = torch.nan
    with pytest.raises(DataError, match="at step 37 of 40; 1 of its 4 rows hold nan"):
        fit_sae([rows], steps=40, k=3, n_latents=24, batch_size=4)


def test_a_watch_that_would_never_be_called_is_refused():
    seen: list[int] = []
    options = {"watch": lambda step, sae: seen.append(step), **SMALL}
    with pytest.raises(ConfigError, match=r"watch_every=500 with 6 steps: .* of 1 to 6"):
        fit_sae(activations(), steps=6, **options)
    with pytest.raises(ConfigError, match="watch_every=7 with 6 steps"):
        fit_sae(activations(), epochs=1, watch_every=7, **options)
    with pytest.raises(ConfigError, match="watch_every=0 with 6 steps"):
        fit_sae(activations(), steps=6, watch_every=0, **options)
    with pytest.raises(ConfigError, match="watch_every=3 without watch"):
        fit_sae(activations(), steps=6, watch_every=3, **SMALL)
    assert not seen
    fit_sae(activations(), steps=6, watch_every=6, **options)
    assert seen == [6]


def test_progress(capsys: pytest.CaptureFixture[str]):
    fit_sae(activations(), steps=6, progress=True, **SMALL)
    assert "6/6" in capsys.readouterr().err
