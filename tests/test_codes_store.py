"""Codes on the disk: what the SAE gives for the same rows, in their order."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipattr.clip.loading import hash_weights
from clipattr.codes import SparseCodes
from clipattr.data import ActivationStore, ActivationStream, EvaluationStream, Ranks
from clipattr.data.codes_store import read_codes, write_codes
from clipattr.errors import ConfigError, DataError
from clipattr.sae.topk import TopKSae
from tests.stores import WIDTH, reader, write

K, N_LATENTS = 4, 40


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """38 images of 3 tokens, two more are broken; four files of several blocks."""
    read = reader(3, bad=(7, 31))
    return write(tmp_path / "activations", tokens=3, read=read, max_bad_fraction=0.1)


def sae_of(seed: int = 0, k: int = K) -> TopKSae:
    """Random, with a bias that leaves rows with fewer than k active latents."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSae(d_model=WIDTH, n_latents=N_LATENTS, k=k, generator=generator)
    with torch.no_grad():
        sae.input_scale.fill_(50.0)
        sae.b_enc.copy_(-2 * torch.rand(N_LATENTS, generator=generator))
    return sae.requires_grad_(False)


class Encoder:
    """Notes what it is given and gives, since rounding depends on the batch; may fail."""

    def __init__(self, sae: TopKSae, fail_after: int | None = None) -> None:
        self.sae = sae
        self.fail_after = fail_after
        self.x: list[Tensor] = []
        self.codes: list[SparseCodes] = []

    def __call__(self, x: Tensor) -> SparseCodes:
        if self.fail_after is not None and self.n_rows >= self.fail_after:
            raise KeyboardInterrupt
        self.x.append(x)
        self.codes.append(self.sae.encode(x))
        return self.codes[-1]

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.x))

    @property
    def all_codes(self) -> SparseCodes:
        indices, values, _ = zip(*self.codes, strict=True)
        return SparseCodes(torch.cat(indices), torch.cat(values), N_LATENTS)


def codes_of(
    store: ActivationStore,
    encode: Encoder,
    folder: Path,
    *,
    k: int = K,
    batch_size: int = 8,
    dtype: str = "float32",
    ranks: Ranks | None = None,
) -> ActivationStore:
    return write_codes(
        store,
        encode,
        k=k,
        n_latents=N_LATENTS,
        folder=folder,
        made_from={"weights": hash_weights(encode.sae)},
        batch_size=batch_size,
        dtype=dtype,
        ranks=ranks or Ranks(),
    )


def check_same_codes(found: SparseCodes, expected: SparseCodes) -> None:
    """To the bit, slot by slot; where nothing fired the index is 0."""
    assert found.n_latents == expected.n_latents == N_LATENTS
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices.where(expected.is_active, 0))
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_round_trip(store: ActivationStore, tmp_path: Path):
    encode = Encoder(sae_of())
    codes = codes_of(store, encode, tmp_path / "codes")
    codes.verify()
    assert torch.equal(torch.cat(encode.x), store.load("x"))
    assert (codes.n_rows, codes.tokens, codes.n_images) == (38 * 3, 3, 40)
    assert np.array_equal(codes.starts, store.starts)
    for name in ("images", "tokens"):
        assert torch.equal(codes.load(name), store.load(name))
    assert codes.keys == store.keys
    assert codes.bad == store.bad
    expected = encode.all_codes
    n_active = expected.is_active.sum(dim=1)
    assert n_active.min() < K
    assert n_active.max() == K
    check_same_codes(read_codes(codes, range(codes.n_rows)), expected)
    rows = torch.tensor([90, 3, 3, 41])
    check_same_codes(read_codes(codes, rows), expected.select(rows))
    check_same_codes(read_codes(codes, range(17, 60)), expected.select(torch.arange(17, 60)))


def test_rows_join_by_image_and_token(store: ActivationStore, tmp_path: Path):
    """By hand: the activation of token t of image i, encoded alone."""
    sae = sae_of()
    codes = codes_of(store, Encoder(sae), tmp_path / "codes")
    places = list(zip(codes.load("images").tolist(), codes.load("tokens").tolist(), strict=True))
    row = places.index((12, 2))
    x = torch.tensor([(12 * 10 + 2) * sign for sign in (1.0, -1.0, 1.0, -1.0, 1.0)])
    found = read_codes(codes, torch.tensor([row]))
    torch.testing.assert_close(found.to_dense(), sae.encode(x[None]).to_dense())


def test_the_same_stream_serves_both(store: ActivationStore, tmp_path: Path):
    sae = sae_of()
    codes = codes_of(store, Encoder(sae), tmp_path / "codes")
    order = {"batch_size": 16, "seed": 3, "length": 9, "lanes": 4, "window": 32}
    rows = ActivationStream(store, fields=("x", "images", "tokens"), **order)
    coded = ActivationStream(codes, fields=("indices", "values", "images", "tokens"), **order)
    for (x, *ids), (indices, values, *again) in zip(rows, coded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ids, again, strict=True))
        found = SparseCodes(indices.long(), values, N_LATENTS)
        torch.testing.assert_close(found.to_dense(), sae.encode(x).to_dense())
    total = sum(
        len(values) for (values,) in EvaluationStream(codes, batch_size=7, fields=("values",))
    )
    assert total == store.n_rows


def test_fewer_slots_are_padded_and_more_refused(store: ActivationStore, tmp_path: Path):
    encode = Encoder(sae_of(k=2))
    codes = codes_of(store, encode, tmp_path / "codes", k=6)
    found = read_codes(codes, range(codes.n_rows))
    assert found.values.shape == (114, 6)
    assert not found.values[:, 2:].any()
    assert not found.indices[:, 2:].any()
    assert torch.equal(found.to_dense(), encode.all_codes.to_dense())
    with pytest.raises(ConfigError, match="k=1: the codes have 2 slots per row"):
        codes_of(store, encode, tmp_path / "codes", k=1)


def test_a_second_call_encodes_nothing_and_another_sae_everything(
    store: ActivationStore, tmp_path: Path
):
    folder = tmp_path / "codes"
    first, second = Encoder(sae_of()), Encoder(sae_of())
    stores = [codes_of(store, encode, folder) for encode in (first, second)]
    assert (first.n_rows, second.n_rows) == (114, 0)
    stores.append(codes_of(store, Encoder(sae_of(seed=1)), folder))
    stores.append(codes_of(store, Encoder(sae_of()), folder, k=5))
    stores.append(codes_of(store, Encoder(sae_of()), folder, dtype="float16"))
    other = write(tmp_path / "other", tokens=3, seed=1)
    stores.append(codes_of(other, Encoder(sae_of()), folder))
    assert len({each.folder for each in stores}) == 5
    assert len({str(each.fingerprint) for each in stores}) == 4
    assert stores[0].fingerprint["activations"] == store.fingerprint


@pytest.mark.parametrize("fail_after", [0, 30, 31, 60, 113])
def test_a_stopped_pass_goes_on_with_the_next_file(
    store: ActivationStore, tmp_path: Path, fail_after: int
):
    whole = codes_of(store, Encoder(sae_of()), tmp_path / "whole", batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        codes_of(store, Encoder(sae_of(), fail_after), tmp_path / "part", batch_size=1)
    starts = store.chunk_starts
    n_done = int(starts[np.searchsorted(starts, fail_after, side="right") - 1])
    encode = Encoder(sae_of())
    part = codes_of(store, encode, tmp_path / "part", batch_size=1)
    assert encode.n_rows == 114 - n_done
    found = {path.name: path.read_bytes() for path in part.folder.iterdir()}
    assert found == {path.name: path.read_bytes() for path in whole.folder.iterdir()}


def test_ranks_write_together(store: ActivationStore, tmp_path: Path):
    alone = codes_of(store, Encoder(sae_of()), tmp_path / "alone")
    barrier = threading.Barrier(3)
    encoders = [Encoder(sae_of()) for _ in range(3)]

    def run(rank: int) -> None:
        ranks = Ranks(rank, 3, lambda: barrier.wait(30))
        codes_of(store, encoders[rank], tmp_path / "many", ranks=ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(encode.n_rows for encode in encoders) == 114
    assert all(encode.n_rows for encode in encoders)
    (folder,) = (tmp_path / "many").iterdir()
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {path.name: path.read_bytes() for path in alone.folder.iterdir()}


def test_size_depends_on_k_and_not_on_the_dictionary(tmp_path: Path):
    """Indices, values, image and token of a row; headers of the members are the rest."""
    store = write(tmp_path / "activations", 400, chunk_images=200, block_rows=100)
    sizes = {}
    for n_latents in (40, 4000):
        generator = torch.Generator().manual_seed(0)
        sae = TopKSae(d_model=WIDTH, n_latents=n_latents, k=K, generator=generator)
        codes = write_codes(
            store,
            sae.encode,
            k=K,
            n_latents=n_latents,
            folder=tmp_path / "codes",
            made_from={"latents": n_latents},
        )
        sizes[n_latents] = codes.n_bytes
    assert sizes[40] == sizes[4000]
    n_files, n_members = 2, 4 * 4
    least = 400 * (4 * K + 4 * K + 4 + 2)
    assert least < sizes[40] < least + n_members * (512 + 128 + 512) + n_files * 1024 + 1


def test_half_precision_values(store: ActivationStore, tmp_path: Path):
    encode = Encoder(sae_of())
    codes = codes_of(store, encode, tmp_path / "codes", dtype="float16")
    found = read_codes(codes, range(codes.n_rows))
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, encode.all_codes.values.half().float())


def test_a_store_of_activations_holds_no_codes(store: ActivationStore):
    with pytest.raises(DataError, match=r"holds no codes, but \['x', 'images', 'tokens'\]"):
        read_codes(store, range(3))
