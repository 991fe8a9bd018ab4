"""The job on a transcoder: rows of both sites, files, metrics, and what is refused."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.choices import Stream, Tokens
from clipattr.config.inputs import ModelConfig, ReadConfig, SiteConfig, check_target
from clipattr.config.load import load_config, to_yaml
from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS, EvaluateWorld, TrainSae
from clipattr.data import ActivationStore, build_index
from clipattr.data.draw import draw_tokens
from clipattr.data.store import hash_json
from clipattr.errors import CheckpointError, ConfigError
from clipattr.jobs.model import FrozenClip, load_frozen, read_activations
from clipattr.jobs.world_data import load_world
from clipattr.main import run_script
from clipattr.sae import SaeRecord, Transcoder, load_sae, save_sae
from clipattr.sae.card import model_card
from tests.tars import write_shard
from tests.tiny import save_tiny_clip

CONFIGS = Path(__file__).parents[1] / "configs"
N_IMAGES, DRAWN = 40, 5
MLP = {"site": Stream.residual_middle, "target": Stream.mlp}


def noise(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


class Job:
    """The shipped config on a tiny model and on shards of noise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny")
        for split, first in (("train", 0), ("val", N_IMAGES)):
            (folder / split).mkdir()
            samples = [
                {"__key__": f"{number:03d}", "png": noise(number)}
                for number in range(first, first + N_IMAGES)
            ]
            write_shard(folder / split / "0.tar", samples)

    def options(self) -> list[str]:
        read = [f"model.name={self.model}", "model.pretrained=null", f"runs={self.folder}/runs"]
        read += [f"data.cache={self.folder}/cache", "data.workers=0", "data.decode=exact"]
        read += [f"data.shards={self.folder}/train", f"held_out={self.folder}/val"]
        read += ["trainer.accelerator=cpu", "trainer.progress=false", "trainer.precision=fp32"]
        read += ["site.layer=0", "target.layer=0", "data.cache_dtype=float32"]
        read += [f"{site}.tokens_per_image={DRAWN}" for site in ("site", "target")]
        small = ["sae.n_latents=48", "sae.k=6", "sae.batch_size=32", "trainer.steps=40"]
        return [*read, *small, "sae.warmup=5", "sae.lr=1e-2", "trainer.checkpoint_every=10"]

    def run(self, *overrides: str) -> int:
        changed = {override.split("=")[0] for override in overrides}
        kept = [option for option in self.options() if option.split("=")[0] not in changed]
        words = [str(CONFIGS / "train" / "transcoder_vitb32.yaml"), *kept, *overrides]
        return run_script("train.py", TRAIN_JOBS, words)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("runs", "transcoder", *parts)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    made = Job(tmp_path_factory.mktemp("job"))
    assert made.run() == 0
    return made


def sites(**changes: object) -> dict[str, SiteConfig]:
    return {name: SiteConfig(0, stream, **changes) for name, stream in MLP.items()}  # type: ignore[arg-type]


# Rows


def read_store(
    job: Job, folder: Path, **changes: object
) -> tuple[FrozenClip, ActivationStore, dict[str, Tensor]]:
    """And the activations at both sites of every image, from `cut.read`, with its tokens."""
    both = sites(**changes)
    frozen = load_frozen(ModelConfig(job.model), both["site"], "cpu", both["target"])
    data = ReadConfig(batch_size=16, workers=0, cache=str(folder))
    index = build_index([job.folder / "train" / "0.tar"], cache=None)
    store = read_activations(frozen, index, data, progress=False)
    clip = load_clip(job.model)
    images = torch.stack(
        [clip.preprocess(Image.open(io.BytesIO(noise(n))).convert("RGB")) for n in range(N_IMAGES)]
    )
    tower = image_tower(clip.model)
    with torch.no_grad():
        cuts = {"x": tower.cut(frozen.cut.site), "y": tower.cut(frozen.target.cut.site)}
        return frozen, store, {name: cut.read(images) for name, cut in cuts.items()}


@pytest.mark.parametrize(
    ("tokens", "drawn"), [(Tokens.cls, None), (Tokens.spatial, 5), (Tokens.all, None)]
)
def test_rows_of_both_sites_are_those_of_one_token(
    job: Job, tmp_path: Path, tokens: Tokens, drawn: int | None
):
    _, store, expected = read_store(job, tmp_path, tokens=tokens, tokens_per_image=drawn)
    owners, numbers = store.load("images").long(), store.load("tokens").long()
    n_tokens = {"cls": 1, "spatial": 16, "all": 17}[tokens.name]
    assert len(owners) == N_IMAGES * (drawn or n_tokens)
    assert not torch.equal(owners, owners.sort().values)  # mixed
    for name, whole in expected.items():
        whole = whole.reshape(N_IMAGES, n_tokens, 32)
        torch.testing.assert_close(store.load(name), whole[owners, numbers], atol=1e-5, rtol=1e-5)
    if drawn is not None:
        due = draw_tokens([f"{n:03d}" for n in range(N_IMAGES)], n_tokens, drawn)
        assert sorted(zip(owners.tolist(), numbers.tolist(), strict=True)) == [
            (image, token) for image, row in enumerate(due.tolist()) for token in sorted(row)
        ]


def test_the_cache_knows_both_sites(job: Job, tmp_path: Path):
    frozen, store, _ = read_store(job, tmp_path)
    assert store.fingerprint["target"] == {"layer": 0, "stream": "mlp", "tokens": "cls"}
    data = ReadConfig(batch_size=16, workers=0, cache=str(tmp_path))
    index = build_index([job.folder / "train" / "0.tar"], cache=None)
    again = read_activations(frozen, index, data, progress=False)
    assert again.folder == store.folder
    alone = read_activations(FrozenClip(frozen.clip, frozen.site), index, data, progress=False)
    assert alone.folder != store.folder
    assert set(alone.columns) == {"x", "images", "tokens"}


# The job


def test_files_say_both_sites_and_how_good_it_is(job: Job):
    sae, record = load_sae(job.path("vitb32"))
    assert isinstance(sae, Transcoder)
    assert (sae.d_model, sae.d_out, sae.k, sae.skip) == (32, 32, 6, True)
    place = {"layer": 0, "tokens": "spatial"}
    assert record.site == {**place, "stream": "residual_middle"}
    assert record.target_site == {**place, "stream": "mlp"}
    metrics = json.loads(job.path("vitb32", "metrics.json").read_text())["sae"]
    assert metrics == record.metrics
    assert metrics["n_rows"] == N_IMAGES * DRAWN
    assert metrics["fvu"] < 0.5
    # Oracle: the held-out rows of the store that the job has left, all at once in float64.
    paths = (job.folder / "cache").glob("*/store.json")
    stores = [ActivationStore.open(path.parent) for path in paths]
    (held_out,) = [one for one in stores if hash_json(one.fingerprint) != record.data_fingerprint]
    x, y = held_out.load("x").double(), held_out.load("y").double()
    with torch.no_grad():
        output = sae.double()(x)
    fvu = (y - output.recon).square().sum() / (y - y.mean(0)).square().sum()
    assert metrics["fvu"] == pytest.approx(float(fvu), rel=1e-4)
    assert metrics["l0"] == pytest.approx(
        float((output.codes.values != 0).sum() / len(x)), rel=0.01
    )


def test_a_grid_of_transcoders(job: Job):
    names = ("name=transcoder/grid", "name=transcoder/one")
    assert job.run(names[0], "sae.k=[4,6]", "sae.skip=[true,false]") == 0
    assert job.run(names[1], "sae.k=4", "sae.skip=false") == 0
    found = {path.parent.name for path in job.path("grid").glob("*/sae.json")}
    assert found == {f"k={k},skip={skip}" for k in (4, 6) for skip in ("true", "false")}
    one, twin = (job.path(*parts) for parts in (("one",), ("grid", "k=4,skip=false")))
    assert (one / "sae.safetensors").read_bytes() == (twin / "sae.safetensors").read_bytes()


def test_layers_counted_from_both_ends_are_compared_in_the_tower(
    job: Job, capsys: pytest.CaptureFixture[str]
):
    assert job.run("name=transcoder/other", "site.layer=1", "target.layer=-2") == 2
    message = capsys.readouterr().err
    assert "config error: target: mlp of layer 0 is computed before the site, " in message
    assert job.run("name=transcoder/other", "target.layer=9") == 2
    assert "config error: target: site.layer=9: the tower has 2 layers" in capsys.readouterr().err


def test_evaluations_of_an_sae_refuse_it(job: Job, capsys: pytest.CaptureFixture[str]):
    words = [f"data.shards={job.folder}/val", "zeroshot.label=null", f"runs={job.folder}/runs"]
    words += [f"model.name={job.model}", f"sae={job.path('vitb32')}", "data.workers=0"]
    words += [f"data.cache={job.folder}/cache", "trainer.accelerator=cpu"]
    config = str(CONFIGS / "evaluate" / "sae.yaml")
    assert run_script("evaluate.py", EVALUATE_JOBS, [config, *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("checkpoint error: ")
    assert "is a transcoder from {'layer': 0, 'stream': 'residual_middle'" in message
    assert "to {'layer': 0, 'stream': 'mlp'" in message
    assert "needs an autoencoder" in message
    world = EvaluateWorld(model=ModelConfig(job.model), sae=str(job.path("vitb32")))
    with pytest.raises(CheckpointError, match="is a transcoder from"):
        load_world(world)


# Files


def test_a_file_without_its_target(tmp_path: Path):
    sae = Transcoder(d_model=4, d_out=3, n_latents=8, k=2)
    site: dict[str, str | int] = {"layer": 5, "stream": "mlp", "tokens": "cls"}
    record = SaeRecord(site, {"name": "m", "weights_sha256": "w"}, "f00d")
    with pytest.raises(CheckpointError, match="target_site is None, .*'transcoder' it is the site"):
        save_sae(sae, tmp_path, record)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"SaeRecord.target_site has keys \['layer'\]"):
        SaeRecord(site, record.model, "f00d", target_site={"layer": 5})
    whole = SaeRecord(site, record.model, "f00d", target_site={**site, "layer": 6})
    save_sae(sae, tmp_path, whole)
    assert load_sae(tmp_path, expected_site=site)[1] == whole
    description = json.loads((tmp_path / "sae.json").read_text())
    assert r"| target site\: layer | 6 |" in model_card(description, repo_id="a/b")
    # As schema 2 had it: the target is not known.
    del description["target_site"]
    (tmp_path / "sae.json").write_text(json.dumps(description | {"schema_version": 2}))
    loaded, old = load_sae(tmp_path)
    assert isinstance(loaded, Transcoder)
    assert old == record
    with pytest.raises(CheckpointError, match="is a transcoder from .* to a site; what"):
        load_sae(tmp_path, one_site=True)


# The config

TEXT = "job: train_sae\nname: x\nheld_out: val\ndata:\n  shards: train\n"
GOOD = ("sae.architecture=transcoder", "site.stream=residual_middle", "target.stream=mlp")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(TEXT)
    return path


def load(path: Path, *overrides: str) -> TrainSae:
    config = load_config([str(path), *overrides], TRAIN_JOBS)
    assert isinstance(config, TrainSae)
    return config


def test_the_target_is_a_section_that_may_be_null(path: Path):
    config = load(path, *GOOD, "sae.k=[4,8]")
    assert config.target == SiteConfig(stream=Stream.mlp)
    assert list(config.sae.members()) == ["k=4", "k=8"]
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(config))
    assert load_config([str(again)], TRAIN_JOBS) == config
    merged = load(again, "target.layer=-2", "site.layer=-2")
    assert merged.target == SiteConfig(layer=-2, stream=Stream.mlp)
    assert load(again, "target=null", "sae.architecture=topk").target is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sae.architecture=transcoder"], ["target=null", "needs the site that it reconstructs"]),
        (["target.stream=mlp"], ["target: is for sae.architecture=transcoder"]),
        ([*GOOD, "site.tokens=all"], ["target.tokens=cls: must be site.tokens=all"]),
        (
            [*GOOD, "site.tokens=all", "target.tokens=all", "site.tokens_per_image=3"],
            ["target.tokens_per_image=null: must be site.tokens_per_image=3"],
        ),
        ([*GOOD, "target.tokens_per_image=3"], ["target.tokens_per_image=3: target.tokens=cls"]),
        (["sae.architecture=transcoder", "target={}"], ["target: residual of", "the site itself"]),
        ([*GOOD, "site.layer=-1", "target.layer=-2"], ["mlp of layer -2 is computed before"]),
        ([*GOOD, "target.stream=attention"], ["attention of layer -1 is computed before the site"]),
        ([*GOOD, "target.streem=mlp"], ["target.streem on the command line", "target.stream?"]),
        ([*GOOD[:2], "target.stream=mpl"], ["target.stream='mpl'", "Did you mean mlp?"]),
        ([*GOOD[:2], "target=mlp"], ["target='mlp'", "a section with keys layer", "or null"]),
        (
            [*GOOD, "trainer.shard_latents=true", "trainer.devices=2"],
            ["sae.architecture=transcoder cannot be divided"],
        ),
        ([*GOOD, "sae.architecture=[transcoder,gated]"], ["transcoder and gated in one grid"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(path: Path, words: list[str], parts: list[str]):
    # The last of two words for one key.
    last = {word.partition("=")[0]: word for word in words}
    with pytest.raises(ConfigError) as caught:
        load(path, *last.values())
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_next_layer_is_behind_every_stream_of_the_last():
    site, target = SiteConfig(3, Stream.mlp), SiteConfig(4, Stream.residual_before)
    check_target(site, target)
    with pytest.raises(ConfigError, match="mlp of layer 3 is computed before the site"):
        check_target(target, site)
    check_target(SiteConfig(5, Stream.mlp), SiteConfig(-9, Stream.mlp))  # the tower will tell


def test_sites_of_a_model_are_resolved(job: Job):
    both = {name: SiteConfig(-2, stream) for name, stream in MLP.items()}
    frozen = load_frozen(ModelConfig(job.model), both["site"], "cpu", both["target"])
    assert frozen.target is not None
    assert frozen.target.cut.site == Site(0, "mlp", "cls")
