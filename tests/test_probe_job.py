"""The job train_probe: what it fits and chooses, against solvers and loops taken by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipattr.clip import Site
from clipattr.codes import SparseCodes
from clipattr.data.order import rows_of_step
from clipattr.jobs.probe_features import open_reader
from clipattr.probes import (
    LogisticProbe,
    SparseProbe,
    Validation,
    load_head,
    load_probe,
    solve_sparse_path,
)
from clipattr.training.probe_grid import ProbeGridModule
from clipattr.training.probe_module import ProbeModule
from tests.probe_images import SITES, Setup, Split
from tests.tars import write_shard

ROOT = Path(__file__).parents[1]
CS = [0.01, 1.0, 100.0]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("probe"))


@torch.no_grad()
def embeddings(setup: Setup, split: Split) -> Tensor:
    return setup.clip.encode_image(setup.pixels(split))


def units(setup: Setup, split: Split) -> Tensor:
    return normalize(embeddings(setup, split), dim=-1)


def path_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "path.csv").read_text().splitlines()))


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())["probe"]


@pytest.mark.parametrize("standardise", [False, True])
def test_lbfgs_is_the_logistic_probe(setup: Setup, standardise: bool):
    words = ["probe.solver=lbfgs", "probe.C=[100, 0.01, 1]", setup.chosen_on]
    run = setup.run(f"lbfgs-{standardise}", *words, f"probe.standardise={standardise}".lower())
    x, y = units(setup, setup.training), setup.training.labels
    held_out = Validation(units(setup, setup.validation), setup.validation.labels)
    wanted = LogisticProbe(CS, standardise=standardise).fit(x, y, validation=held_out)
    probe, record = load_probe(run)
    torch.testing.assert_close(probe.weight, wanted.to_linear().weight, atol=1e-3, rtol=1e-3)
    assert metrics_of(run)["chosen"] == {"C": wanted.C_}
    rows = path_of(run)
    assert [float(row["C"]) for row in rows] == CS
    assert [float(row["score"]) for row in rows] == pytest.approx([s for _, s in wanted.path_])
    assert [row["chosen"] for row in rows].count("True") == 1
    assert record.metrics["train_accuracy"] == pytest.approx(wanted.score(x, y))
    assert record.metrics["validation_accuracy"] == pytest.approx(wanted.score(*held_out[:2]))


def test_the_grid_is_chosen_on_the_validation_images(setup: Setup, tmp_path: Path):
    """Their labels are swapped: what is best on the training images is worst there."""
    swapped = Split(tmp_path / "swapped", 60, seed=2, share=0.8)
    for path in swapped.folder.glob("*.tar"):
        path.unlink()
    swapped.labels = 1 - swapped.labels
    write_shard(swapped.folder / "000.tar", [swapped._sample(n) for n in range(60)])
    words = ["probe.lr=[1e-4, 0.3]", "probe.weight_decay=[0, 0.1]", f"validation={swapped.folder}"]
    run = setup.run("grid", *words)
    x, y = units(setup, swapped), swapped.labels
    rows = path_of(run)
    points = [(float(row["weight_decay"]), float(row["lr"])) for row in rows]
    assert points == [(0.1, 1e-4), (0.1, 0.3), (0, 1e-4), (0, 0.3)]
    scores = [float(row["score"]) for row in rows]
    (chosen,) = (number for number, row in enumerate(rows) if row["chosen"] == "True")
    assert chosen == max(range(4), key=lambda number: scores[number])
    assert points[chosen][1] == 1e-4
    probe, _ = load_probe(run)
    assert (probe(x).argmax(1) == y).double().mean().item() == pytest.approx(scores[chosen])
    assert metrics_of(run)["train"]["accuracy"] < 0.99
    others = setup.run("high", "probe.lr=0.3")
    assert metrics_of(others)["train"]["accuracy"] > metrics_of(run)["train"]["accuracy"]


def test_dfr_serves_the_worst_group(setup: Setup):
    words = ["probe.solver=lbfgs", "probe.C=[1, 100]", "probe.groups=json:cue", setup.chosen_on]
    worst = {}
    for method in ("erm", "dfr"):
        run = setup.run(method, *words, "probe.criterion=worst_group", f"probe.method={method}")
        found = metrics_of(run)["validation"]
        probe, _ = load_probe(run)
        held_out = setup.validation
        right = probe(units(setup, held_out)).argmax(1) == held_out.labels
        groups = held_out.labels * 2 + held_out.cue
        accuracies = [right[groups == group].double().mean().item() for group in range(4)]
        worst[method] = found["worst_group"]
        assert found["worst_group"] == pytest.approx(min(accuracies))
        assert found["groups"]["bright"]["without"] == pytest.approx(accuracies[2])
        assert found["gap"] == pytest.approx(right.double().mean().item() - min(accuracies))
    assert worst["dfr"] > worst["erm"] + 0.05


def test_groups_may_come_from_latents(setup: Setup):
    latent = int(codes_of(setup, setup.training, "cls").sum(0).argmax())
    words = ["probe.solver=lbfgs", f"probe.groups_latents=[{latent}]", "probe.method=balanced"]
    run = setup.run("inferred", *words, f"sae={setup.folder / 'sae-cls'}")
    fires = codes_of(setup, setup.training, "cls")[:, latent] > 0
    found = metrics_of(run)["train"]["groups"]
    probe, _ = load_probe(run)
    right = probe(units(setup, setup.training)).argmax(1) == setup.training.labels
    of_group = right[fires & (setup.training.labels == 1)]
    assert 0.1 < fires.double().mean() < 0.9
    assert found["bright"]["with"] == pytest.approx(of_group.double().mean().item())


@torch.no_grad()
def codes_of(setup: Setup, split: Split, site: str) -> Tensor:
    x = setup.tower.cut(SITES[site]).read(setup.pixels(split))
    codes = setup.saes[site].encode(x).to_dense()
    return codes.amax(1) if codes.ndim == 3 else codes


def test_sparse_path_on_codes(setup: Setup):
    words = ["probe.features=[codes]", "probe.head=sparse", "probe.solver=lbfgs", "probe.C=[0.3]"]
    run = setup.run("sparse", *words, f"sae={setup.folder / 'sae-spatial'}")
    head, record = load_head(run)
    assert isinstance(head, SparseProbe)
    assert record.feature.startswith("codes(layer=0, stream=residual, tokens=spatial")
    dense = codes_of(setup, setup.training, "spatial")
    every = torch.arange(dense.shape[1]).expand_as(dense)
    codes = SparseCodes(every.contiguous(), dense, dense.shape[1])
    (wanted,) = solve_sparse_path(codes, setup.training.labels[:, None].float(), [0.3])
    torch.testing.assert_close(head.weight, wanted.to_probe().weight, atol=2e-3, rtol=1e-2)
    assert 0 < len(head.latents) < dense.shape[1]


def test_several_labels(setup: Setup):
    words = ["probe.label=[json:label, json:other]", "probe.classes=[]", "probe.solver=lbfgs"]
    run = setup.run("labels", *words, "probe.C=[0.1, 10]", setup.chosen_on)
    head, record = load_head(run)
    assert (record.class_names, record.is_multilabel) == (["label", "other"], True)
    x, split = units(setup, setup.training), setup.training
    C = metrics_of(run)["chosen"]["C"]
    for number, y in enumerate((split.labels, split.other)):
        alone = LogisticProbe(C).fit(x, y)
        weight = torch.as_tensor(alone.coef_).float()
        torch.testing.assert_close(head.weight[[number]], weight, atol=1e-3, rtol=1e-3)
        found = metrics_of(run)["train"]["labels"][record.class_names[number]]
        assert found["accuracy"] == pytest.approx(alone.score(x, y))


def test_between_the_text_head_and_the_probe(setup: Setup):
    words = ["probe.solver=lbfgs", "probe.C=[100]", setup.chosen_on]
    text = setup.run("text", *words, "probe.wise_ft=[0]", "probe.prompts=[night, day]")
    whole, _ = load_probe(setup.run("whole", *words))
    start, _ = load_probe(text)
    assert start.weight.norm(dim=1).tolist() == pytest.approx([setup.clip.logit_scale] * 2)
    assert not start.bias.any()
    run = setup.run("wise", *words, "probe.wise_ft=[0, 0.5, 1]", "probe.prompts=[night, day]")
    x, y = units(setup, setup.validation), setup.validation.labels
    expected = [
        ((1 - a) * start(x) + a * whole(x)).argmax(1).eq(y).double().mean().item()
        for a in (0.0, 0.5, 1.0)
    ]
    rows = path_of(run)
    assert [float(row["score"]) for row in rows[1:]] == pytest.approx(expected)
    alpha = [0.0, 0.5, 1.0][max(range(3), key=lambda number: expected[number])]
    assert metrics_of(run)["chosen"] == {"C": 100, "alpha": alpha}
    first = setup.run("init", "probe.init=text", "probe.prompts=[night, day]", "probe.lr=1e-9")
    torch.testing.assert_close(load_probe(first)[0].weight, start.weight)


@pytest.mark.parametrize("kind", ["mlp", "attention", "sparse"])
def test_other_heads_learn(setup: Setup, kind: str):
    words = {
        "mlp": ["probe.features=[embedding_raw, site]", "site.layer=0", "probe.hidden=8"],
        "attention": ["probe.features=[site]", "site.layer=0", "site.tokens=spatial"],
        "sparse": ["probe.features=[embedding, codes]", f"sae={setup.folder / 'sae-cls'}"],
    }[kind]
    more = [] if kind == "sparse" else ["probe.standardise=true"]
    run = setup.run(kind, *words, *more, f"probe.head={kind}", "trainer.steps=60")
    head, record = load_head(run)
    reader = open_reader(record.feature, setup.clip, f"{setup.folder}/sae-cls")
    features = reader.of_images(setup.pixels(setup.training), [])
    accuracy = (head(features).argmax(1) == setup.training.labels).double().mean().item()
    assert accuracy == pytest.approx(record.metrics["train_accuracy"])
    assert accuracy > 0.8


def test_standardised_sgd_is_the_plain_loop(setup: Setup):
    run = setup.run(
        "plain",
        "probe.features=[embedding_raw, site]",
        "site.layer=0",
        "probe.standardise=true",
        "probe.class_weight=balanced",
    )
    with torch.no_grad():
        site = setup.tower.cut(Site(0)).read(setup.pixels(setup.training))
    x = torch.cat([embeddings(setup, setup.training), site], dim=1)
    y = setup.training.labels
    shift, spread = x.mean(0), x.std(0, correction=0)
    weight = len(y) / (2 * torch.bincount(y).float())
    W, b = torch.zeros(2, x.shape[1]).requires_grad_(), torch.zeros(2).requires_grad_()
    groups = [{"params": [W], "weight_decay": 1e-4}, {"params": [b], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + torch.tensor(torch.pi * step / 30).cos().item()) / 2
        rows = rows_of_step(90, 32, 0, step)
        loss = cross_entropy((x[rows] - shift) / spread @ W.T + b, y[rows], weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W, b], 1.0)
        optimizer.step()
    head, _ = load_head(run)
    torch.testing.assert_close(head.weight, (W / spread).detach(), atol=1e-3, rtol=1e-3)
    folded = (b - (W / spread) @ shift).detach()
    torch.testing.assert_close(head.bias, folded, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("standardise", ["false", "true"])
def test_a_killed_grid_goes_on_with_the_same_bits(
    setup: Setup, standardise: str, monkeypatch: pytest.MonkeyPatch
):
    words = ["probe.lr=[0.1, 0.01]", setup.chosen_on, f"probe.standardise={standardise}"]
    whole = setup.run(f"whole-{standardise}", *words)
    step = ProbeGridModule.training_step

    def killed(self: ProbeGridModule, batch: tuple, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 17:
            raise MemoryError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ProbeGridModule, "training_step", killed)
    with pytest.raises(MemoryError):
        setup.run(f"again-{standardise}", *words)
    resumed: list[int] = []

    def watched(self: ProbeGridModule, batch: tuple, batch_idx: int) -> Tensor:
        resumed.append(self.trainer.global_step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ProbeGridModule, "training_step", watched)
    again = setup.run(f"again-{standardise}", *words)
    assert resumed[0] == 10
    found, expected = load_probe(again)[0], load_probe(whole)[0]
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)


def test_a_finished_run_is_not_done_again(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    setup.run("twice")
    monkeypatch.setattr(ProbeModule, "training_step", None)
    setup.run("twice")


@pytest.mark.slow
@pytest.mark.parametrize("standardise", ["false", "true"])
def test_two_processes_train_the_probe_of_one(setup: Setup, standardise: str):
    words = ["probe.lr=[0.1, 0.01]", setup.chosen_on, f"probe.standardise={standardise}"]
    one = setup.run(f"one-{standardise}", *words)
    again = setup.words(f"two-{standardise}", *words, "trainer.devices=2", cache=standardise)
    command = [sys.executable, str(ROOT / "train.py"), *again]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = (
        load_probe(setup.folder / "runs" / f"two-{standardise}")[0],
        load_probe(one)[0],
    )
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-4)
