"""The reliance of classes on latents: signs against a plain loop, counts by class, the files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import (
    LastLayerHead,
    Reliance,
    RelianceOrigin,
    build_lens_table,
    closed_form_attribution,
    count_positive,
    load_reliance,
    reliance,
    save_reliance,
)
from clipattr.attribution.reliance_files import ALL_IMAGES, IMAGES_OF_CLASS
from clipattr.callbacks.reliance import RelianceTotals
from clipattr.codes import SparseCodes
from clipattr.errors import CheckpointError
from clipattr.metrics.class_sums import ClassCounts
from clipattr.report.reliance import reliance_table, write_reliance_parquet

N_IMAGES, D_MODEL, D_EMBED, N_LATENTS, N_CLASSES = 40, 12, 7, 15, 3
SILENT = 4


@pytest.fixture(scope="module")
def scene() -> tuple[LastLayerHead, Tensor, SparseCodes, Tensor]:
    """Signed codes, padding that names active latents, one latent that never fires."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights, bias = normalize(draw(N_CLASSES, D_EMBED), dim=1), draw(D_EMBED)
    gamma, beta, projection = draw(D_MODEL), draw(D_MODEL), draw(D_MODEL, D_EMBED)
    head = LastLayerHead(gamma, beta, 1e-5, projection, bias, weights)
    W_dec = normalize(draw(N_LATENTS, D_MODEL), dim=1)
    x = 2 * draw(N_IMAGES, D_MODEL) + 1
    chosen = [torch.randperm(N_LATENTS, generator=generator)[:5] for _ in range(N_IMAGES)]
    indices, values = torch.stack(chosen), draw(N_IMAGES, 5)
    values[indices == SILENT] = 0
    values[::3, 3:] = 0
    indices[::3, 4] = indices[::3, 0]
    return head, x, SparseCodes(indices, values, N_LATENTS), W_dec


def plain_counts(head: LastLayerHead, x: Tensor, codes: SparseCodes, W_dec: Tensor) -> Tensor:
    """[2, class, latent]: how often it fired and how often it was positive, one slot at a time."""
    found = torch.zeros(2, N_CLASSES, N_LATENTS)
    for number in range(N_CLASSES):
        targets = torch.full((len(x),), number)
        attribution = closed_form_attribution(head, x, codes, W_dec, targets)
        for image in range(len(x)):
            for slot, latent in enumerate(codes.indices[image].tolist()):
                if codes.values[image, slot] != 0:
                    found[0, number, latent] += 1
                    found[1, number, latent] += bool(attribution[image, slot] > 0)
    return found


@pytest.mark.parametrize("entries", [1, 30, 2**22])
def test_positive_attributions_are_counted(scene, entries: int, monkeypatch):
    monkeypatch.setattr(reliance, "_ENTRIES", entries)
    head, x, codes, W_dec = scene
    counts = torch.zeros(N_LATENTS, N_CLASSES, dtype=torch.int32)
    table = build_lens_table(head, W_dec)
    for rows in torch.arange(N_IMAGES).split(17):
        count_positive(counts, head, table, x[rows], codes.select(rows), W_dec)
    expected = plain_counts(*scene)[1]
    assert torch.equal(counts.T.float(), expected)
    assert 0 < float(expected.mean()) < 40


def test_totals_divide_by_the_images_in_which_a_latent_fires(scene):
    head, x, codes, W_dec = scene
    total, without = (RelianceTotals(head, W_dec, signs=signs) for signs in (True, False))
    for rows in torch.arange(N_IMAGES).split(17):
        total.update(x[rows], codes.select(rows))
        without.update(x[rows], codes.select(rows))
    found = total.compute()
    fired, positive = plain_counts(*scene)
    assert found.share_positive is not None
    torch.testing.assert_close(found.share_positive, positive / fired, equal_nan=True)
    assert found.share_positive[:, SILENT].isnan().all()
    assert int(found.share_positive.isnan().sum()) == N_CLASSES
    assert found.n_images == N_IMAGES
    other = without.compute()
    assert other.share_positive is None
    assert torch.equal(other.mean_attribution, found.mean_attribution)


def test_counts_by_class_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(20)])
    codes = SparseCodes(indices, torch.randn(20, 3, generator=generator), 6)
    codes.values[::2, 2] = 0
    values = torch.randn(20, 3, generator=generator)
    classes = torch.randint(3, (20,), generator=generator)
    counts = ClassCounts(n_classes=4, n_latents=6)
    for rows in torch.arange(20).split(7):
        counts.update(classes[rows], codes.select(rows), values[rows])
    fired, positive = torch.zeros(2, 4, 6, dtype=torch.int32)
    for image, number in enumerate(classes.tolist()):
        for slot, latent in enumerate(indices[image].tolist()):
            if codes.values[image, slot] != 0:
                fired[number, latent] += 1
                positive[number, latent] += int(values[image, slot] > 0)
    found = counts.compute()
    assert found.images.tolist() == classes.bincount(minlength=4).tolist()
    assert torch.equal(found.fired, fired)
    assert torch.equal(found.positive, positive)


def make(over: str, *, signs: bool = True) -> Reliance:
    """Latent 1 never fires, nor does any in an image of the last class."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    share = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    positive = torch.rand(3, 5, generator=generator)
    share[:, 1], share[2] = 0, 0
    if over == ALL_IMAGES:
        share = share[0]
    mean, positive = torch.where(share == 0, 0, mean), torch.where(share == 0, torch.nan, positive)
    model = {"name": "tiny", "weights_sha256": "0" * 64}
    site: dict[str, str | int] = {"layer": 1, "stream": "residual", "tokens": "cls"}
    names, n_images = ["cat", "dog", "cat, big"], [7, 7, 0]
    head = {"probe": "runs/probe"}
    origin = RelianceOrigin(names, n_images, over, model, site, "runs/sae", head)
    return Reliance(mean, share, positive if signs else None, origin)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("over", [ALL_IMAGES, IMAGES_OF_CLASS])
def test_what_is_saved_is_loaded(tmp_path: Path, over: str, signs: bool):
    made = make(over, signs=signs)
    save_reliance(made, tmp_path)
    found = load_reliance(tmp_path, {"name": "other", "weights_sha256": "0" * 64})
    assert found.origin == made.origin
    for name in ("mean_attribution", "share_of_images"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    if made.share_positive is None:
        assert found.share_positive is None
    else:
        assert found.share_positive is not None
        assert torch.equal(found.share_positive.nan_to_num(-1), made.share_positive.nan_to_num(-1))


def test_what_does_not_fit_is_refused(tmp_path: Path):
    made = make(IMAGES_OF_CLASS)
    save_reliance(made, tmp_path)
    with pytest.raises(CheckpointError, match="belongs to model"):
        load_reliance(tmp_path, {"name": "tiny", "weights_sha256": "1" * 64})
    with pytest.raises(CheckpointError, match="shape of share_of_images"):
        save_reliance(made._replace(share_of_images=made.share_of_images[0]), tmp_path)
    with pytest.raises(CheckpointError, match="axes of mean_attribution"):
        save_reliance(made._replace(mean_attribution=made.mean_attribution[0]), tmp_path)
    text = (tmp_path / "reliance.json").read_text()
    for old, new, words in (
        ('"over": "images of the class"', '"over": "some"', "over is 'some'"),
        ('"cat, big"', '"cat, big", "fish"', "number of n_images"),
        ('"sae"', '"sea"', "missing fields"),
    ):
        assert old in text
        (tmp_path / "reliance.json").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=words):
            load_reliance(tmp_path)


@pytest.mark.parametrize("over", [ALL_IMAGES, IMAGES_OF_CLASS])
def test_the_long_table_has_what_fired(tmp_path: Path, over: str):
    made = make(over)
    write_reliance_parquet(made, tmp_path / "reliance.parquet")
    file = parquet.ParquetFile(tmp_path / "reliance.parquet")
    assert file.num_row_groups == 3
    assert [str(each) for each in file.schema_arrow.types] == [
        "dictionary<values=string, indices=int32, ordered=0>",
        "int32",
        *["float"] * 3,
    ]
    said = {
        key.decode(): json.loads(text)
        for key, text in file.metadata.metadata.items()
        if key.startswith(b"clipattr.")
    }
    assert said["clipattr.site"] == made.origin.site
    assert said["clipattr.over"] == over
    assert {"clipattr.model", "clipattr.sae", "clipattr.head"} < said.keys()
    assert made.share_positive is not None
    for number, name in enumerate(made.origin.class_names):
        share = made.share_of_images if over == ALL_IMAGES else made.share_of_images[number]
        fired = share.nonzero().flatten().tolist()
        table = file.read_row_group(number)
        assert table.column("class").to_pylist() == [name] * len(fired)
        assert table.column("latent").to_pylist() == fired
        for column, of_class in (
            ("mean_attribution", made.mean_attribution[number]),
            ("share_of_images", share),
            ("share_positive", made.share_positive[number]),
        ):
            expected = of_class[fired].float().numpy()
            np.testing.assert_array_equal(table.column(column).to_numpy(), expected)
    assert len(fired) == (4 if over == ALL_IMAGES else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["reliance.parquet"]


def test_without_signs_the_column_is_empty(tmp_path: Path):
    made = make(ALL_IMAGES, signs=False)
    write_reliance_parquet(made, tmp_path / "reliance.parquet")
    column = parquet.read_table(tmp_path / "reliance.parquet").column("share_positive")
    assert column.null_count == len(column) == 12
    rows = list(csv.DictReader(reliance_table(made, 2).splitlines()))
    assert [row["share_positive"] for row in rows] == [""] * 6


def test_the_short_table_has_the_largest(tmp_path: Path):
    made = make(IMAGES_OF_CLASS)
    rows = list(csv.DictReader(reliance_table(made, 2).splitlines()))
    assert made.share_positive is not None
    for number, name in enumerate(made.origin.class_names[:2]):
        order = made.mean_attribution[number].abs().argsort(descending=True)[:2].tolist()
        of_class = [row for row in rows if row["class"] == name]
        assert [int(row["latent"]) for row in of_class] == order
        for row, latent in zip(of_class, order, strict=True):
            for column in ("mean_attribution", "share_of_images", "share_positive"):
                expected = float(getattr(made, column)[number, latent])
                assert float(row[column]) == pytest.approx(expected, rel=1e-5)
    assert [row["share_positive"] for row in rows if row["class"] == "cat, big"] == ["", ""]
