"""An atlas beside the audit: cues by words, cues by unexpected reliance, labels of latents."""

import csv
import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import parquet
from pyarrow import table as arrow_table

from clipattr.config.schema import EVALUATE_JOBS
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_atlas import Unexpected, read_unexpected
from clipattr.main import run_script
from clipattr.report.shortcuts.page import render
from clipattr.semantics.atlas_files import load_atlas
from tests.shortcuts_content import full_content
from tests.test_atlas_job import AtlasJob, keep_everything
from tests.test_evaluate_sae import NAMES

CONFIGS = Path(__file__).parents[1] / "configs" / "evaluate"
# Two are classes of the atlas, in other capitals.
CLASSES = ["Star", "moon", *(f"other {number}" for number in range(len(NAMES) - 2))]
WORDS, N_UNEXPECTED = "a blue moon", 3


class Audit(AtlasJob):
    """Atlases at two sites, which list all pairs as unexpected, and a probe."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Of noise nothing is above chance.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clipattr.semantics.unexpected.SIGMAS", -1e9)
            patch.setattr("clipattr.jobs.atlas_unexpected.evidence_threshold", keep_everything)
            classes = f"zeroshot.classes={json.dumps(['star', 'Moon', *NAMES[2:]])}"
            self.atlases = {
                site: self.atlas(site, f"name=atlas-{site}", classes) for site in self.saes
            }
        self.save_probe(CLASSES)

    def audit(self, name: str, *overrides: str) -> int:
        words = self.places("last") | {
            "name": name,
            "probe": str(self.folder / "probe"),
            "atlas": str(self.atlases["last"]),
            "cues": f"[{{name: moonlight, words: {WORDS}}}]",
            "repair.shards": "null",
            "shortcuts.resamples": "20",
            "shortcuts.confirmed": "4",
            "shortcuts.shown": "1",
        }
        del words["zeroshot.classes"]
        words["model.pretrained"] = "null"
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [str(CONFIGS / "shortcuts.yaml"), *(f"{k}={v}" for k, v in words.items())]
        return run_script("evaluate.py", EVALUATE_JOBS, arguments)

    def find(self, query: str, top: int) -> list[dict]:
        words = {
            "atlas": str(self.atlases["last"]),
            "query": query,
            "top": str(top),
            "name": "found",
            "runs": str(self.folder / "runs"),
            "cache": str(self.folder / "cache"),
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        arguments = [
            str(CONFIGS / "find.yaml"),
            *(f"{key}={value}" for key, value in words.items()),
        ]
        assert run_script("evaluate.py", EVALUATE_JOBS, arguments) == 0
        return json.loads(self.path("found", "find.json").read_text())["answers"][0]["most"]

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("runs", *parts)

    def metrics(self, name: str = "both") -> dict:
        return json.loads(self.path(name, "metrics.json").read_text())


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    made = Audit(tmp_path_factory.mktemp("audit"))
    assert made.audit("both", f"shortcuts.unexpected={N_UNEXPECTED}") == 0
    return made


def expected_cues(audit: Audit) -> dict[str, list[int]]:
    """Row by row: each latent once, for the first of our classes that stands beside it."""
    table = parquet.read_table(audit.atlases["last"] / "unexpected.parquet").to_pylist()
    found: dict[str, list[int]] = {}
    for row in table:
        if row["class"] in ("star", "Moon") and [row["latent"]] not in found.values():
            found[f"latent {row['latent']} ({row['label']}, for {row['class']})"] = [row["latent"]]
    return dict(list(found.items())[:N_UNEXPECTED])


def test_the_latents_of_words_are_those_that_find_lists(audit: Audit):
    cue = audit.metrics()["cues"]["moonlight"]
    assert cue["latents"] == [each["latent"] for each in audit.find(WORDS, 3)]
    assert cue["kinds"] == ["words"]
    assert "removal" in cue["effects"]


def test_there_may_be_more_or_fewer(audit: Audit):
    cues = f"[{{name: one, words: {WORDS}}}, {{name: other, words: {WORDS}}}]"
    assert audit.audit("five", "shortcuts.latents_of_words=5", f"cues={cues}") == 0
    found = [each["latent"] for each in audit.find(WORDS, 5)]
    assert [cue["latents"] for cue in audit.metrics("five")["cues"].values()] == [found, found]


def test_unexpected_latents_of_the_probes_classes_are_cues(audit: Audit):
    cues = audit.metrics()["cues"]
    expected = expected_cues(audit)
    assert len(expected) == N_UNEXPECTED
    assert list(cues) == ["moonlight", *expected]
    for name, latents in expected.items():
        assert cues[name]["latents"] == latents
        assert cues[name]["kinds"] == ["latents"]


def test_latents_have_the_first_labels_of_the_atlas(audit: Audit):
    atlas, metrics = load_atlas(audit.atlases["last"]), audit.metrics()

    def words_of(latent: int) -> list[str]:
        return [word for word, _ in atlas.words_of(latent)][:3]

    for cue in metrics["cues"].values():
        assert cue["labels"] == {str(one): words_of(one) for one in cue["latents"]}
    amplified = metrics["amplified"]["latents"]
    assert len(amplified) == 4
    rows = list(csv.DictReader(audit.path("both", "amplified.csv").read_text().splitlines()))
    page = audit.path("both", "report", "index.html").read_text()
    plain = " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())
    for row, (latent, each) in zip(rows, amplified.items(), strict=True):
        assert each["labels"] == words_of(int(latent))
        assert row["labels"] == "; ".join(each["labels"])
        assert f"latent {latent} ({', '.join(each['labels'])}) significant" in plain or (
            f"latent {latent} ({', '.join(each['labels'])}) not significant" in plain
        )
    moonlight = metrics["cues"]["moonlight"]["latents"]
    listed = ", ".join(f"{one} ({', '.join(words_of(one))})" for one in moonlight)
    assert f"latents {listed}" in plain
    assert str(audit.atlases["last"]) in plain


def test_the_log_names_latents(audit: Audit, caplog):
    caplog.set_level("INFO")
    assert audit.audit("logged", "shortcuts.automatic=true") == 0
    metrics = audit.metrics("logged")
    cue = metrics["cues"]["moonlight"]
    latents = ", ".join(f"{one} [{', '.join(cue['labels'][str(one)])}]" for one in cue["latents"])
    assert f"moonlight: latents {latents}" in caplog.text
    latent, first = next(iter(metrics["amplified"]["latents"].items()))
    assert f"latent {latent} [{', '.join(first['labels'])}] (" in caplog.text


def test_without_an_atlas_latents_are_numbers(audit: Audit):
    assert audit.audit("bare", "atlas=null", "cues=[{name: one, latents: [3]}]") == 0
    metrics = audit.metrics("bare")
    assert metrics["cues"]["one"]["labels"] == {}
    assert all(each["labels"] == [] for each in metrics["amplified"]["latents"].values())


def test_a_list_about_other_classes_says_which(audit: Audit, caplog):
    audit.save_probe([f"other {number}" for number in range(len(NAMES))])
    assert audit.audit("others", "shortcuts.unexpected=2") == 0
    audit.save_probe(CLASSES)
    assert list(audit.metrics("others")["cues"]) == ["moonlight"]
    message = "no unexpected latent became a cue"
    table = parquet.read_table(audit.atlases["last"] / "unexpected.parquet").to_pydict()
    names = ", ".join(sorted(set(table["class"])))
    line = next(line for line in caplog.text.splitlines() if message in line)
    assert f"is about {names}, and the probe tells other 0, other 1" in line
    assert message in audit.path("others", "report", "index.html").read_text()


def test_prompts_are_compared_as_well(audit: Audit):
    """A probe of other names, beside prompts that are the atlas's classes."""
    audit.save_probe([f"other {number}" for number in range(len(NAMES))])
    prompts = ["star", "moon", *(f"prompt {number}" for number in range(len(NAMES) - 2))]
    overrides = [f"shortcuts.unexpected={N_UNEXPECTED}", f"prompts={json.dumps(prompts)}"]
    assert audit.audit("prompts", *overrides) == 0
    audit.save_probe(CLASSES)
    assert list(audit.metrics("prompts")["cues"]) == ["moonlight", *expected_cues(audit)]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["atlas={all}"], ["sha256 of its SAE's weights is"]),
        (["atlas={sae}"], ["atlas.json: cannot be read"]),
        (["atlas=no"], ["atlas='no'", "does not exist"]),
        (["sae=null"], ["sae=null", "the latents of an SAE"]),
        (["atlas=null"], ["moonlight has words='a blue moon'", "atlas=null"]),
        (["atlas=null", "cues=[]", "shortcuts.unexpected=2"], ["unexpected=2, and atlas=null"]),
        (["shortcuts.unexpected=-1"], ["shortcuts.unexpected=-1", "0 or greater"]),
        (["shortcuts.latents_of_words=0"], ["latents_of_words=0", "greater than 0"]),
        (["cues=[{name: a, words: x, latents: [1]}]"], ["latents=[1] and words='x'"]),
        (["cues=[{name: a, words: ' '}]"], ["cues[0].words=' '", "empty text"]),
    ],
)
def test_refusals(audit: Audit, capsys, overrides: list[str], parts: list[str]):
    places = {"{all}": str(audit.atlases["all"]), "{sae}": str(audit.folder / "last")}
    for short, path in places.items():
        overrides = [each.replace(short, path) for each in overrides]
    assert audit.audit("refused", *overrides) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert not audit.path("refused", "metrics.json").exists()


def test_a_list_that_is_none(tmp_path: Path):
    path = tmp_path / "unexpected.parquet"
    with pytest.raises(DataError, match="no list of unexpected latents"):
        read_unexpected(path, 3)
    path.write_bytes(b"PAR")
    with pytest.raises(DataError, match="no list of unexpected latents"):
        read_unexpected(path, 3)
    parquet.write_table(arrow_table({"latent": [1]}), path)
    with pytest.raises(DataError, match="no list of unexpected latents"):
        read_unexpected(path, 3)
    rows = {"class": ["boat"], "latent": [3], "label": ["sea"]}
    parquet.write_table(arrow_table(rows), path)
    assert read_unexpected(path, 4) == [Unexpected("boat", 3, "sea")]
    with pytest.raises(DataError, match="not among the 3"):
        read_unexpected(path, 3)


def test_labels_on_the_page_are_text():
    content = full_content()
    cue = replace(content.cues[0], labels={275: ["<i>sea</i>"]})
    amplified = [replace(each, labels=["<b>sky</b>"]) for each in content.amplified or []]
    page = render(replace(content, cues=[cue], amplified=amplified))
    assert "&lt;i&gt;sea&lt;/i&gt;" in page
    assert page.count("<bdi>&lt;b&gt;sky&lt;/b&gt;</bdi>") == len(amplified)
    assert "<i>" not in page
    assert "The strongest is latent 275 (&lt;b&gt;sky&lt;/b&gt;), of" in page
    assert "<b>sky" not in page


def test_the_name_of_an_unexpected_cue_can_be_a_folder():
    assert Unexpected("boat", 275, "sea").name == "latent 275 (sea, for boat)"
    assert Unexpected("on/off", 7, r"a\b").name == "latent 7 (a b, for on off)"
