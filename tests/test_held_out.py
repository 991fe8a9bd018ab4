"""The held-out metrics: of every row once, batch by batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.data import ActivationStore, EvaluationStream
from clipattr.errors import DataError
from clipattr.jobs import train_sae
from clipattr.jobs.model import choose_device
from clipattr.jobs.train_sae import reconstruct
from clipattr.metrics.reconstruction import Reconstruction
from clipattr.sae.topk import TopKSae
from tests.stores import WIDTH, reader, write


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """114 rows of 38 images; half precision holds these numbers exactly."""
    read = reader(3, bad=(7, 31))
    return write(tmp_path, tokens=3, read=read, dtype="float16", max_bad_fraction=0.1)


@pytest.fixture
def sae() -> TopKSae:
    generator = torch.Generator().manual_seed(0)
    sae = TopKSae(d_model=WIDTH, n_latents=40, k=3, generator=generator)
    with torch.no_grad():
        sae.input_scale.fill_(50.0)
        sae.b_enc.copy_(-torch.rand(40, generator=generator))
    return sae.requires_grad_(False)


@pytest.mark.parametrize("batch_size", [1, 10, 114, 1000])
def test_batches_give_the_numbers_of_the_whole(
    store: ActivationStore, sae: TopKSae, batch_size: int
):
    found = reconstruct(sae, store, batch_size)
    whole = Reconstruction(d_model=WIDTH, n_latents=40)
    x = store.load("x").float()
    output = sae(x)
    whole.update(x, output.recon, output.codes)
    for ours, expected in zip(found, whole.compute(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert found.n_rows == 114
    assert found.fvu > 0


class Lossy(EvaluationStream):
    """Serves the second batch in place of the third."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        batches = list(super().__iter__())
        return iter([*batches[:2], batches[1], *batches[3:]])


class Short(EvaluationStream):
    """Forgets its last batch."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(list(super().__iter__())[:-1])


@pytest.mark.parametrize(
    ("stream", "message"), [(Lossy, "not the same ones"), (Short, "saw 110 rows, 114 are due")]
)
def test_a_lost_row_is_noticed(
    store: ActivationStore,
    sae: TopKSae,
    monkeypatch: pytest.MonkeyPatch,
    stream: type[EvaluationStream],
    message: str,
):
    monkeypatch.setattr(train_sae, "EvaluationStream", stream)
    with pytest.raises(DataError, match=message):
        reconstruct(sae, store, 10)


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert choose_device("auto") == "cuda:0"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert choose_device("gpu") == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("gpu") == "cuda:3"
