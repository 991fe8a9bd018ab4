"""Repairs of a probe on a synthetic shortcut: what they reach, and what they may never look at."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.jobs import repair_fits
from clipattr.jobs.repair_fits import Fit, fit_by_groups, groups_of, hold_out
from clipattr.jobs.shortcut_repair import (
    METHODS,
    STRENGTHS,
    Repaired,
    RepairRows,
    obstacle,
    repair,
    save_repaired,
    trade_off,
)
from clipattr.metrics.quality import measure_quality
from clipattr.probes import LogisticProbe
from clipattr.probes.files import ProbeRecord, load_head, load_probe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.robust import GroupRows, fit_groups
from clipattr.shortcuts.repair import Suppression, find_erasure
from clipattr.shortcuts.suppression_files import FEATURE, SuppressionRecord, load_suppression
from tests.test_repair import erase

WIDTH, CORE, CUE = 12, 0, 1
CS = (1.0, 10.0, 100.0)
NAMES = ("intact", "cracked")
MODEL = {"name": "tiny", "weights_sha256": "a" * 64}


def draw(n: int, agreement: float, *, seed: int, strengths: tuple[float, ...]) -> RepairRows:
    """Unit rows in which one feature is the label's and a louder one the cue's."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    has_cue = labels.bool() == (torch.rand(n, generator=generator) < agreement)
    rows = torch.randn(n, WIDTH, generator=generator)
    rows[:, CORE] += 3.0 * labels
    rows[:, CUE] += 4.0 * has_cue
    cleaned = []
    for strength in strengths:
        edited = rows.clone()
        edited[:, CUE] -= strength * 4.0 * (has_cue.float() - 0.5)
        cleaned.append(normalize(edited, dim=1))
    known = torch.ones(n, dtype=torch.bool)
    sources = torch.arange(n)
    return RepairRows(normalize(rows, dim=1), torch.stack(cleaned), labels, has_cue, known, sources)


@pytest.fixture(scope="module")
def learn() -> RepairRows:
    return draw(1200, 0.93, seed=1, strengths=(1.0,))


@pytest.fixture(scope="module")
def evaluate() -> RepairRows:
    return draw(2000, 0.5, seed=2, strengths=STRENGTHS)


def as_probe(fitted: LogisticProbe) -> LinearProbe:
    probe = LinearProbe(WIDTH, 2)
    weight, bias = (torch.from_numpy(each).float() for each in (fitted.coef_, fitted.intercept_))
    probe.load_state_dict(
        {"weight": torch.cat([0 * weight, weight]), "bias": torch.cat([0 * bias, bias])}
    )
    return probe


@pytest.fixture(scope="module")
def probe(learn: RepairRows) -> LinearProbe:
    return as_probe(LogisticProbe(C=10.0).fit(learn.embeddings, learn.labels))


def run(probe: LinearProbe, learn: RepairRows, evaluate: RepairRows, **changes) -> list[Repaired]:
    options = {"methods": METHODS, "direction": None, "classes": NAMES, "Cs": CS, "seed": 0}
    return repair(probe, learn, evaluate, **(options | changes))


@pytest.fixture(scope="module")
def repaired(probe: LinearProbe, learn: RepairRows, evaluate: RepairRows) -> dict[str, Repaired]:
    return {each.name: each for each in run(probe, learn, evaluate)}


@pytest.mark.parametrize("method", METHODS)
def test_worst_group_comes_back(repaired, evaluate: RepairRows, method: str):
    before, *_, after = trade_off(repaired[method], evaluate)
    fair = as_probe(LogisticProbe(C=10.0).fit(evaluate.embeddings, evaluate.labels))
    with torch.no_grad():
        logits = fair(evaluate.embeddings)
    reference = measure_quality(logits, evaluate.labels, has_cue=evaluate.has_cue)
    lost = reference.worst_group - before.worst_group
    assert lost > 0.15
    # On the sphere a loud cue makes the rest quieter, which the unchanged probe was not told.
    assert after.worst_group - before.worst_group > (0.4 if method == "suppress" else 0.7) * lost
    assert after.accuracy > before.accuracy


@pytest.mark.parametrize("method", METHODS)
def test_strength_0_is_the_probe_as_it_came(probe, repaired, evaluate: RepairRows, method: str):
    before = evaluate.embeddings.double() @ probe.weight.detach().double().T
    before += probe.bias.detach().double()
    assert torch.equal(repaired[method].logits[0], before)
    assert repaired[method].strengths == list(STRENGTHS)
    assert repaired[method].needs_suppression == (method in ("suppress", "retrain"))


def test_strength_0_reads_the_embeddings_themselves(probe, repaired, learn, evaluate):
    cleaned = evaluate.cleaned.clone()
    cleaned[0] = torch.nan
    (found,) = run(probe, learn, evaluate._replace(cleaned=cleaned), methods=["suppress"])
    assert torch.equal(found.logits, repaired["suppress"].logits)


@pytest.mark.parametrize("method", METHODS)
def test_strength_1_is_the_saved_probe_on_what_it_reads(repaired, evaluate, method: str):
    found = repaired[method]
    read = evaluate.cleaned[-1] if found.needs_suppression else evaluate.embeddings
    with torch.no_grad():
        expected = found.probe.double()(read.double())
    found.probe.float()
    torch.testing.assert_close(found.logits[-1], expected, rtol=0, atol=1e-12)


def test_half_way_of_each_kind(probe, repaired, evaluate: RepairRows):
    middle, cleaned = STRENGTHS.index(0.5), evaluate.cleaned[2].double()
    with torch.no_grad():
        old = probe.double()(cleaned)
        new = repaired["retrain"].probe.double()(cleaned)
    for each in (probe, repaired["retrain"].probe):
        each.float()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(repaired["suppress"].logits[middle], old, **close)
    torch.testing.assert_close(repaired["retrain"].logits[middle], (old + new) / 2, **close)
    ends = repaired["dfr"].logits[[0, -1]]
    torch.testing.assert_close(repaired["dfr"].logits[middle], ends.mean(dim=0), **close)


def test_projection_is_the_probe_on_erased_embeddings(probe, repaired, learn, evaluate):
    erasure = find_erasure(learn.embeddings, learn.labels, learn.has_cue)
    for number, strength in enumerate(STRENGTHS):
        erased = erase(evaluate.embeddings, erasure, strength)
        expected = erased @ probe.weight.detach().double().T + probe.bias.detach().double()
        found = repaired["project"].logits[number]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_prompt_is_projected_instead_of_the_flags(probe, learn, evaluate):
    direction = torch.zeros(WIDTH)
    direction[CUE] = 5.0
    nothing_known = learn._replace(known=torch.zeros_like(learn.known))
    (found,) = run(probe, nothing_known, evaluate, methods=["project"], direction=direction)
    assert float(found.probe.weight.detach()[:, CUE].abs().max()) < 1e-6
    kept = [column for column in range(WIDTH) if column != CUE]
    torch.testing.assert_close(found.probe.weight[:, kept], probe.weight[:, kept])
    mean = learn.embeddings.mean(dim=0)
    with torch.no_grad():
        torch.testing.assert_close(found.probe(mean), probe(mean), rtol=1e-4, atol=1e-5)


def test_evaluated_rows_decide_nothing(probe, repaired, learn, evaluate):
    """Other images, labels and flags there leave every repaired probe as it is, bit for bit."""
    other = draw(300, 0.1, seed=5, strengths=STRENGTHS)
    other = other._replace(labels=1 - other.labels)
    for found in run(probe, learn, other):
        for one, two in zip(
            found.probe.parameters(), repaired[found.name].probe.parameters(), strict=True
        ):
            assert torch.equal(one, two), found.name


@pytest.mark.parametrize("method", ["retrain", "dfr", "balanced", "group_dro"])
def test_rows_that_choose_are_not_fitted(probe, learn, evaluate, monkeypatch, method: str):
    seen = []
    fit_groups = repair_fits.fit_groups

    def watch(name, rows, *, validation, **options):
        seen.append((name, rows, validation, options["criterion"]))
        return fit_groups(name, rows, validation=validation, **options)

    monkeypatch.setattr(repair_fits, "fit_groups", watch)
    run(probe, learn, evaluate, methods=[method])
    ((name, rows, validation, criterion),) = seen
    assert name == ("erm" if method == "retrain" else method)
    assert criterion == "worst_group"
    fitted, choosing = (
        {tuple(row) for row in each.features.tolist()} for each in (rows, validation)
    )
    given = learn.cleaned[-1] if method == "retrain" else learn.embeddings
    assert not fitted & choosing
    assert fitted | choosing == {tuple(row) for row in given.tolist()}
    assert torch.bincount(validation.groups).tolist() == [
        int(count) // 5 for count in torch.bincount(groups_of(learn))
    ]


def test_held_out_is_a_fifth_of_every_stratum():
    generator = torch.Generator().manual_seed(3)
    labels, known = (torch.randint(0, 2, (203,), generator=generator) for _ in range(2))
    has_cue = torch.rand(203, generator=generator) < 0.1
    rows = RepairRows(torch.zeros(203, 1), None, labels, has_cue, known.bool(), torch.arange(203))
    held_out = hold_out(rows, 0)
    for label in (0, 1):
        for is_known, side in ((True, True), (True, False), (False, None)):
            chosen = (labels == label) & (rows.known == is_known)
            if side is not None:
                chosen &= has_cue == side
            n = int(chosen.sum())
            expected = 0 if n < 3 else max(1, n // 5)
            assert int((held_out & chosen).sum()) == expected
    assert torch.equal(held_out, hold_out(rows, 0))
    assert not torch.equal(held_out, hold_out(rows, 1))


def test_what_is_made_of_one_picture_is_held_out_with_it():
    """Twins on both sides of the cut would let a fit be chosen on what it has seen."""
    labels = torch.arange(90) % 3
    made = torch.arange(0, 90, 2)
    rows = RepairRows(
        torch.zeros(135, 1),
        None,
        torch.cat([labels, labels[made]]),
        torch.arange(135) >= 90,
        torch.ones(135, dtype=torch.bool),
        torch.cat([torch.arange(90), made]),
    )
    held_out = hold_out(rows, 0)
    assert torch.equal(held_out[90:], held_out[made])
    # 15 of each class are there twice, and 15 once.
    assert torch.bincount(groups_of(rows)[held_out]).tolist() == [6, 3] * 3


def test_a_choice_within_the_noise_is_the_better_calibrated():
    """No other C within a standard error of the best worst group has a smaller log loss."""
    learn = draw(1200, 0.93, seed=6, strengths=(1.0,))
    Cs = (0.001, 0.01, 0.1, 1.0, 10.0)
    held_out = hold_out(learn, 0)
    groups, unit = groups_of(learn), learn.embeddings.double()
    found = fit_by_groups("balanced", learn, Fit(2, Cs, 0))
    tried = {}
    for C in Cs:
        one = fit_groups(
            "balanced",
            GroupRows(learn.embeddings[~held_out], learn.labels[~held_out], groups[~held_out]),
            n_classes=2,
            Cs=[C],
        ).probe
        with torch.no_grad():
            logits = one.double()(unit[held_out])
        right = (logits.argmax(dim=1) == learn.labels[held_out]).double()
        loss = -logits.log_softmax(dim=1)[torch.arange(len(logits)), learn.labels[held_out]]
        by_group = [groups[held_out] == group for group in range(4)]
        rates = [float(right[members].mean()) for members in by_group]
        place = rates.index(min(rates))
        n_worst = int(by_group[place].sum())
        error = (rates[place] * (1 - rates[place]) / n_worst) ** 0.5
        tried[C] = (
            rates[place],
            error,
            sum(float(loss[members].mean()) for members in by_group),
            one,
        )
    top = max(tried.values(), key=lambda each: each[0])
    within = {C: each for C, each in tried.items() if each[0] >= top[0] - top[1]}
    assert len(within) > 1
    C = min(within, key=lambda each: within[each][2])
    # The strongest penalty of the best score is another one.
    assert max(tried, key=lambda each: tried[each][0]) != C
    wanted = within[C][3].weight.double()
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_known", [0, 200])
def test_retraining_with_few_flags_or_none(probe, learn, evaluate, n_known: int):
    known = torch.arange(len(learn.labels)) < n_known
    (found,) = run(probe, learn._replace(known=known), evaluate, methods=["retrain"])
    before, *_, after = trade_off(found, evaluate)
    assert after.worst_group > before.worst_group + 0.1


def test_obstacles(probe, learn: RepairRows, evaluate: RepairRows):
    bare = learn._replace(cleaned=None)
    unknown = learn._replace(known=torch.zeros_like(learn.known))
    one_side = learn._replace(has_cue=learn.labels == 1)
    rare = learn._replace(known=~((learn.labels == 0) & learn.has_cue))
    rare.known[((learn.labels == 0) & learn.has_cue).nonzero()[:2]] = True
    assert "no latents" in obstacle("suppress", bare, direction=None, classes=NAMES)
    assert "no latents" in obstacle("retrain", bare, direction=None, classes=NAMES)
    for rows in (unknown, one_side):
        assert "with and without" in obstacle("project", rows, direction=None, classes=NAMES)
        assert obstacle("project", rows, direction=torch.ones(WIDTH), classes=NAMES) is None
    assert "no learning image says" in obstacle("dfr", unknown, direction=None, classes=NAMES)
    for method in ("dfr", "balanced", "group_dro"):
        found = obstacle(method, rare, direction=None, classes=NAMES)
        assert found == "'intact' with the cue has 2 learning images, at least 3 are needed"
        assert obstacle(method, learn, direction=None, classes=NAMES) is None
    with pytest.raises(DataError, match="repair dfr: 'intact' with the cue has 2"):
        run(probe, rare, evaluate, methods=["project", "dfr"])
    with pytest.raises(ValueError, match="not cleaned at the strengths"):
        run(probe, learn, evaluate._replace(cleaned=learn.cleaned), methods=["suppress"])


RECORD = ProbeRecord(["intact", "cracked"], MODEL, "json:cracked", "learned from")
SITE = {"layer": 1, "stream": "residual", "tokens": "cls"}
SUPPRESSION = (
    Suppression(torch.tensor([4]), torch.tensor([0.5])),
    SuppressionRecord("sticker", "runs/sae", "b" * 64, 16, SITE, MODEL),
)


@pytest.mark.parametrize("method", METHODS)
def test_files(repaired, tmp_path: Path, method: str):
    found = repaired[method]
    save_repaired(tmp_path, found, RECORD, SUPPRESSION)
    assert torch.equal(load_head(tmp_path)[0].weight, found.probe.weight)
    if not found.needs_suppression:
        assert load_probe(tmp_path)[1] == RECORD
        assert not list(tmp_path.glob("suppression*"))
        return
    # Whoever would give it plain embeddings is stopped.
    with pytest.raises(CheckpointError, match="feature is"):
        load_probe(tmp_path)
    assert load_head(tmp_path)[1].feature == FEATURE
    assert load_suppression(tmp_path, MODEL)[1] == SUPPRESSION[1]
    with pytest.raises(ConfigError, match="saved with its suppression"):
        save_repaired(tmp_path / "other", found, RECORD, None)
    assert not (tmp_path / "other").exists()


def test_three_classes_and_an_empty_group(evaluate: RepairRows):
    """A class that never has the cue."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(600) % 3
    has_cue = (torch.rand(600, generator=generator) < 0.4) & (labels != 1)
    rows = torch.randn(600, WIDTH, generator=generator)
    rows[torch.arange(600), 3 + labels] += 3
    rows[:, CUE] += 3.0 * has_cue
    unit = normalize(rows, dim=1)
    known, sources = torch.ones(600, dtype=torch.bool), torch.arange(600)
    learn = RepairRows(unit, None, labels, has_cue, known, sources)
    names = ("a", "b", "c")
    methods = ["project", "balanced", "dfr"]
    found = run(LinearProbe(WIDTH, 3), learn, learn, methods=methods, classes=names)
    for each in found:
        assert each.logits.shape == (5, 600, 3)
    for each in found[1:]:
        assert trade_off(each, learn)[-1].worst_group > 0.7
