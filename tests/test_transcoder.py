"""Transcoders in training: pairs of rows, from Python and from a store of two columns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.data import ActivationStore
from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import NPY_HEADER, Column
from clipattr.data.writer import StorePlan, write_stores
from clipattr.errors import ConfigError, DataError
from clipattr.sae import TopKSae, Transcoder
from clipattr.training import fit_sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.streams import Place
from clipattr.training.trainer import build_trainer, fit
from tests.stores import FINGERPRINT, keys_of
from tests.test_training import N_STEPS, KillAt, KilledError, settings

D_MODEL, D_OUT, K = 8, 12, 3
HOW = {"lr": 1e-2, "warmup": 3, "k_aux": 4, "aux_coefficient": 0.1, "dead_after": 32}
MORE = {"k_start": 6, "k_steps": 10, "ema": 0.9}
SMALL = {"k": K, "n_latents": 24, "batch_size": 32}
ATOMS = normalize(torch.randn(D_MODEL, D_OUT, generator=torch.Generator().manual_seed(5)), dim=1)
LINEAR = 0.5 * torch.randn(D_MODEL, D_OUT, generator=torch.Generator().manual_seed(6))


def pairs(n_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y = 4 sum_j ReLU(x_j - 4) v_j + L x + c: on average 1.3 of 8 latents, and a linear map."""
    x = 3 + torch.randn(n_rows, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return x, 4 * (x - 4).relu() @ ATOMS + x @ LINEAR - 2


@torch.no_grad()
def fvu(recon: Tensor, y: Tensor) -> float:
    return float((y - recon).square().sum() / (y - y.mean(0)).square().sum())


def test_a_planted_map_is_recovered():
    x, y = pairs(8192)
    held_x, held_y = pairs(2000, seed=1)
    found = {
        skip: fit_sae(
            x,
            Transcoder,
            targets=y,
            **{"k": 4, "n_latents": 24, "skip": skip},
            **{"steps": 400, "batch_size": 128, "lr": 2e-2, "warmup": 20},
        )
        for skip in (True, False)
    }
    errors = {skip: fvu(one(held_x).recon, held_y) for skip, one in found.items()}
    assert errors[True] < 0.015
    assert errors[False] > 0.05  # the latents have to make the linear map as well
    assert ((ATOMS @ found[True].W_dec.T).amax(dim=1) > 0.95).all()
    ones, held_ones = torch.ones(len(x), 1), torch.ones(len(held_x), 1)
    linear = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    assert fvu(torch.cat([held_x, held_ones], 1) @ linear, held_y) > 0.15


# Steps of the module


def pair_store(x: Tensor, y: Tensor, folder: Path) -> ActivationStore:
    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield ReadBatch(images, {"s": {"x": x[images], "y": y[images]}}, [])

    columns = {"x": Column("float32", x.shape[1]), "y": Column("float32", y.shape[1])}
    plan = StorePlan(folder, FINGERPRINT, columns)
    return write_stores({"s": plan}, keys_of(len(x)), read)["s"]


class Recorded(ActivationDataModule):
    """Keeps what it served, and starts from the first of it, as whoever has a stream alone."""

    def first_rows(self, n_rows: int) -> tuple[Tensor, ...]:
        place = Place(rank=0, world_size=1, local_world_size=1, pin_memory=False)
        self.served = [tuple(one.clone() for one in batch) for batch in self.open_stream(place)]
        return tuple(torch.cat(column)[:n_rows] for column in zip(*self.served, strict=True))


def data_of(folder: Path, kind: type[ActivationDataModule]) -> ActivationDataModule:
    return kind(
        lambda _: pair_store(*pairs(200), folder / "store"),
        batch_size=32,
        seed=0,
        n_steps=N_STEPS,
        fields=("x", "y"),
    )


def small(**changes: int) -> Transcoder:
    sizes = {"d_model": D_MODEL, "d_out": D_OUT, "n_latents": 64, "k": K} | changes
    return Transcoder(**sizes, skip=True, generator=torch.Generator().manual_seed(1))


def run(
    folder: Path,
    *,
    kind: type[ActivationDataModule] = ActivationDataModule,
    kill_at: int | None = None,
) -> tuple[SaeModule, ActivationDataModule]:
    data = data_of(folder, kind)
    module = SaeModule({"": SaeMember(small(), **HOW, **MORE)}, n_steps=N_STEPS)
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    fit(build_trainer(settings(), folder, callbacks=callbacks), module, data, folder)
    return module, data


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_fit_sae_takes_the_steps_of_the_module(tmp_path: Path):
    module, data = run(tmp_path, kind=Recorded)
    assert isinstance(data, Recorded)
    parts = zip(*(torch.cat(one).split(50) for one in zip(*data.served, strict=True)), strict=True)
    ours = fit_sae(parts, small(), steps=N_STEPS, batch_size=32, **HOW, **MORE)
    theirs = module.by_name[""].finish()
    check_same(ours.state_dict(), theirs.state_dict())
    assert (ours.k, theirs.k) == (K, K)
    assert not torch.equal(ours.W_skip, torch.zeros_like(ours.W_skip))


def test_resumed_run_ends_with_the_same_bits(tmp_path: Path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill_at=13)
    resumed, _ = run(tmp_path / "killed")
    check_same(whole.state_dict(), resumed.state_dict())


def test_it_starts_from_both_sites_and_keeps_unit_directions(tmp_path: Path):
    module, _ = run(tmp_path)
    x, y = pairs(200)
    sae = module.by_name[""].sae
    assert isinstance(sae, Transcoder)
    torch.testing.assert_close(sae.input_mean, x.mean(0))
    spread = ((y - y.mean(0)).square().sum(1).mean() / D_OUT).sqrt()
    torch.testing.assert_close(sae.output_scale, spread)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_auxk_reaches_dead_latents_through_the_target():
    x, y = pairs(64)
    sae = small()
    member = SaeMember(sae, **HOW)
    member.initialise_from(x, y)
    with torch.no_grad():
        sae.b_enc[:20] = -100.0
    member.history.rows_since_fired[:20] = 1000
    step = member(x, y)
    assert 0 < step.loss.auxiliary < 10
    step.loss.auxiliary.backward()
    # Of the dead ones alone: z of all of them is below zero, so that the ReLU stops it as well.
    assert not sae.W_dec.grad[20:].any()
    with torch.no_grad():
        sae.b_enc[:20] = -1.0
    sae.zero_grad()
    member(x, y).loss.auxiliary.backward()
    assert sae.W_dec.grad[:20].any()
    assert not sae.W_dec.grad[20:].any()


def test_broken_rows_of_either_site_are_named(tmp_path: Path):
    data = data_of(tmp_path, ActivationDataModule)
    data.store = data.open_store(None)  # type: ignore[arg-type]
    place = Place(rank=0, world_size=1, local_world_size=1, pin_memory=False)
    data.stream = data.open_stream(place)
    assert data.describe_batch(0).startswith("its 32 rows are finite")
    owner = data.store.keys[int(data.store.load("images")[0])]
    (file,) = (tmp_path / "store").glob("*.tar")
    with file.open("r+b") as opened:
        opened.seek(int(data.store._offsets["y"][0]) + NPY_HEADER)
        opened.write(torch.tensor([torch.nan]).numpy().tobytes())
    found = [data.describe_batch(t) for t in range(6)]
    (broken,) = [text for text in found if not text.startswith("its 32 rows")]
    assert broken.startswith("1 of its 32 rows hold nan or infinity")
    assert broken.endswith(f"rows of {owner}")


# What fit_sae takes


def test_a_tensor_is_shuffled_with_its_targets():
    x, y = pairs(200)
    tensor = fit_sae(x, Transcoder, targets=y, steps=6, **SMALL)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    same = fit_sae([(x[order], y[order])], Transcoder, steps=6, **SMALL)
    check_same(tensor.state_dict(), same.state_dict())
    other = fit_sae(x, Transcoder, targets=y.flip(0), steps=6, **SMALL)
    assert not torch.equal(tensor.W_dec, other.W_dec)
    assert tensor.settings == {"d_model": 8, "d_out": 12, "n_latents": 24, "k": 3, "skip": False}


def test_epochs_of_pairs_are_counted_in_rows():
    x, y = pairs(200)
    parts = list(zip(x.split(48), y.split(48), strict=True))
    epochs = fit_sae(parts, Transcoder, epochs=3, **SMALL)
    steps = fit_sae(parts, Transcoder, steps=3 * 200 // 32, **SMALL)
    check_same(epochs.state_dict(), steps.state_dict())


def test_what_is_missing_superfluous_or_unequal_says_so():
    x, y = pairs(200)
    with pytest.raises(ConfigError, match="a transcoder needs targets"):
        fit_sae(x, Transcoder, **SMALL)
    with pytest.raises(ConfigError, match="targets are for a Transcoder"):
        fit_sae(x, targets=y, **SMALL)
    with pytest.raises(ConfigError, match="targets beside a list"):
        fit_sae([(x, y)], Transcoder, targets=y, **SMALL)
    with pytest.raises(DataError, match="200 rows and 199 targets"):
        fit_sae(x, Transcoder, targets=y[1:], **SMALL)
    with pytest.raises(DataError, match="200 rows and 199 targets"):
        fit_sae([(x, y[1:])], Transcoder, **SMALL)
    with pytest.raises(DataError, match=r"targets gave torch.int64 \[200, 12\]"):
        fit_sae(x, Transcoder, targets=y.long(), **SMALL)
    with pytest.raises(DataError, match=r"targets gave torch.float32 \[200, 11\].*\[n, 12\]"):
        fit_sae([(x, y), (x, y[:, 1:])], Transcoder, **SMALL)
    with pytest.raises(DataError, match=r"rows gave torch.float32 \[200, 8\].*must be a pair"):
        fit_sae([x], Transcoder, **SMALL)
    with pytest.raises(DataError, match="rows gave 3 of them.*must be a pair"):
        fit_sae(lambda: [(x, y, y)], Transcoder, **SMALL)
    with pytest.raises(DataError, match="targets of 12 numbers for a transcoder with d_out=5"):
        fit_sae(x, small(d_out=5), targets=y, steps=1, batch_size=32)
    with pytest.raises(TypeError, match="positional"):
        SaeMember(TopKSae(d_model=8, n_latents=9, k=2), **HOW).initialise_from(x, y)
