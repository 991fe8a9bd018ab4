"""Push and pull through huggingface_hub's own client, to and from a hub in this process."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from clipattr.errors import CheckpointError, ConfigError
from clipattr.sae import SaeRecord, TopKSae, load_sae, pull_sae, push_sae, save_sae
from clipattr.sae.card import MARK, model_card
from tests.hub_server import OWNER, TOKEN, HubServer, serve, use_endpoint

REPOSITORY = f"{OWNER}/an-sae"
SITE: dict[str, str | int] = {"layer": 11, "stream": "residual", "tokens": "cls"}
# Of huggingface_hub, about its own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(tmp_path, monkeypatch) as server:
        yield server


def saved(folder: Path, seed: int = 0, name: str = "hf-hub:laion/CLIP-ViT-B-32") -> Path:
    sae = TopKSae(d_model=6, n_latents=20, k=3, generator=torch.Generator().manual_seed(seed))
    model = {"name": name, "weights_sha256": "abc"}
    save_sae(sae, folder, SaeRecord(SITE, model, "f00d", metrics={"fvu": 0.125, "l0": 3.0}))
    return folder


def recon(folder: Path) -> torch.Tensor:
    return load_sae(folder)[0](X).recon


def failure(kind: type[Exception], call, *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert TOKEN not in message
    assert len(message.splitlines()) == 1
    return message


def test_what_is_pulled_is_what_was_pushed(hub: HubServer, tmp_path: Path):
    folder = saved(tmp_path / "sae")
    (folder / "secret.txt").write_text("not for the hub")
    url = push_sae(folder, REPOSITORY, token=TOKEN)
    assert re.fullmatch(rf"{hub.endpoint}/{REPOSITORY}/commit/\w{{40}}", url)
    assert sorted(hub.files[REPOSITORY, "main"]) == ["README.md", "sae.json", "sae.safetensors"]
    pulled = pull_sae(REPOSITORY)
    for name in ("sae.json", "sae.safetensors"):
        assert (pulled / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(recon(pulled), recon(folder))


def test_pulling_takes_the_files_of_an_sae_alone_and_the_cache_is_enough(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    push_sae(saved(tmp_path / "sae"), REPOSITORY, token=TOKEN)
    hub.files[REPOSITORY, "main"] |= {"big.bin": b"x", "code.py": b"x", "a/sae.json": b"x"}
    pulled = pull_sae(REPOSITORY, cache=tmp_path / "own")
    assert pulled.is_relative_to(tmp_path / "own")
    assert sorted(file.name for file in pulled.rglob("*") if file.is_file()) == [
        "README.md", "sae.json", "sae.safetensors",
    ]  # fmt: skip
    use_endpoint("http://127.0.0.1:1", monkeypatch)
    assert pull_sae(REPOSITORY, cache=tmp_path / "own") == pulled


def test_several_saes_in_one_repository(hub: HubServer, tmp_path: Path):
    folders = {f"k{seed}/a": saved(tmp_path / str(seed), seed) for seed in (1, 2)}
    for path, folder in folders.items():
        push_sae(folder, REPOSITORY, path_in_repo=path, token=TOKEN)
    for path, folder in folders.items():
        pulled = pull_sae(REPOSITORY, subfolder=path)
        assert torch.equal(recon(pulled), recon(folder))
        assert f"pull_sae('{REPOSITORY}', subfolder='{path}')" in (pulled / "README.md").read_text()
    message = failure(CheckpointError, pull_sae, REPOSITORY)
    assert message.startswith(f"{hub.endpoint}/{REPOSITORY} holds no sae.json and no sae.safet")


def test_a_branch_is_made_and_a_commit_stays(hub: HubServer, tmp_path: Path):
    first, second = saved(tmp_path / "1", 1), saved(tmp_path / "2", 2)
    commit = push_sae(first, REPOSITORY, token=TOKEN).rsplit("/", 1)[1]
    push_sae(second, REPOSITORY, revision="next", token=TOKEN)
    assert torch.equal(recon(pull_sae(REPOSITORY)), recon(first))
    assert torch.equal(recon(pull_sae(REPOSITORY, revision="next")), recon(second))
    assert torch.equal(recon(pull_sae(REPOSITORY, revision=commit)), recon(first))
    push_sae(second, REPOSITORY, token=TOKEN)
    assert torch.equal(recon(pull_sae(REPOSITORY)), recon(second))


def test_name_without_an_owner_is_the_user_s(hub: HubServer, tmp_path: Path):
    push_sae(saved(tmp_path / "sae"), "an-sae", private=True, token=TOKEN)
    assert hub.private == {REPOSITORY}
    assert f"pull_sae('{REPOSITORY}')" in hub.files[REPOSITORY, "main"]["README.md"].decode()
    assert "not shown to you" in failure(CheckpointError, pull_sae, REPOSITORY)
    pull_sae(REPOSITORY, token=TOKEN)


def test_card_of_another_hand_is_left_alone(hub: HubServer, tmp_path: Path):
    folder = saved(tmp_path / "sae")
    push_sae(folder, REPOSITORY, token=TOKEN)
    files = hub.files[REPOSITORY, "main"]
    push_sae(folder, REPOSITORY, license="mit", token=TOKEN)
    assert b"license: mit" in files["README.md"]
    files["README.md"] = b"# My own words"
    push_sae(saved(tmp_path / "other", 1), REPOSITORY, token=TOKEN)
    assert files["README.md"] == b"# My own words"


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        (None, REPOSITORY, "is not there, or not shown to you"),
        ("hf_wrong", REPOSITORY, "hf auth login"),
        (TOKEN, "others/sae", "may write to repositories of 'others'"),
    ],
)
def test_pushing_without_the_right(
    hub: HubServer, tmp_path: Path, token: str | None, repository: str, message: str
):
    said = failure(CheckpointError, push_sae, saved(tmp_path / "sae"), repository, token=token)
    assert message in said
    assert said.startswith(f"{hub.endpoint}/{repository}")
    assert hub.files == {}


def test_what_is_not_there(hub: HubServer, tmp_path: Path):
    push_sae(saved(tmp_path / "sae"), REPOSITORY, token=TOKEN)
    assert "is not there" in failure(CheckpointError, pull_sae, "nobody/nothing")
    message = failure(CheckpointError, pull_sae, REPOSITORY, revision="v9")
    assert message == f"{hub.endpoint}/{REPOSITORY} has no revision 'v9'"
    del hub.files[REPOSITORY, "main"]["sae.safetensors"]
    assert "holds no sae.safetensors in" in failure(CheckpointError, pull_sae, REPOSITORY)
    hub.gated.add(REPOSITORY)
    message = failure(CheckpointError, pull_sae, REPOSITORY, cache=tmp_path / "empty")
    assert "accepted its conditions there" in message


def test_wrong_names_are_refused_before_anything_is_asked(hub: HubServer, tmp_path: Path):
    folder = saved(tmp_path / "sae")
    assert "repo_id='a/b/c': " in failure(ConfigError, push_sae, folder, "a/b/c", token=TOKEN)
    assert "repo_id='a b': " in failure(ConfigError, pull_sae, "a b")
    for path in ("../x", "/x", "a//b", "x/", "[a]", "*"):
        assert "path_in_repo=" in failure(
            ConfigError, push_sae, folder, REPOSITORY, path_in_repo=path
        )
        assert "subfolder=" in failure(ConfigError, pull_sae, REPOSITORY, subfolder=path)
    (folder / "sae.safetensors").write_bytes(b"damaged")
    assert "sha256 is" in failure(CheckpointError, push_sae, folder, REPOSITORY, token=TOKEN)
    assert hub.requests == []


def test_hub_in_trouble(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "sae")
    hub.status = 418
    for call, arguments in ((push_sae, (folder, REPOSITORY)), (pull_sae, (REPOSITORY,))):
        assert "the hub answered 418" in failure(CheckpointError, call, *arguments, token=TOKEN)
    use_endpoint("http://127.0.0.1:1", monkeypatch)
    start = time.perf_counter()
    for call, arguments in ((push_sae, (folder, REPOSITORY)), (pull_sae, (REPOSITORY,))):
        message = failure(CheckpointError, call, *arguments, token=TOKEN)
        assert "could not be reached (ConnectError: " in message
        assert "HF_ENDPOINT" in message
    assert time.perf_counter() - start < 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(CheckpointError, pull_sae, REPOSITORY)


def test_the_card_says_what_the_sae_is(tmp_path: Path):
    folder = saved(tmp_path / "sae")
    text = model_card(json.loads((folder / "sae.json").read_text()), repo_id="a/b", license="mit")
    matter, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(matter) == {
        "library_name": "clipattr",
        "tags": ["clip", "interpretability", "sparse-autoencoder"],
        "license": "mit",
        "base_model": "laion/CLIP-ViT-B-32",
    }
    assert body.startswith(MARK)
    for row in ("| k | 3 |", "| fvu | 0.125 |", "| l0 | 3 |", r"| site\: layer | 11 |"):
        assert row in body
    code = body.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "pull_sae('a/b')" in code


def test_names_in_the_files_are_no_markup(tmp_path: Path):
    evil = 'x"\n---\nlicense: evil\n| a | <script>alert(1)</script> [b](http://c) `d` &amp; _e_'
    folder = saved(tmp_path / "sae", name=evil)
    text = model_card(json.loads((folder / "sae.json").read_text()), repo_id="a/b")
    matter, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert sorted(yaml.safe_load(matter)) == ["library_name", "tags"]
    (row,) = (line for line in body.splitlines() if line.startswith("| model |"))
    # What is left without a backslash before it has no meaning in Markdown, nor in HTML.
    assert not re.search(r"(?<!\\)[<>&`|\[\]_*:]", row.removeprefix("| model |").removesuffix("|"))
    assert re.sub(r"\\(.)", r"\1", row) == "| model | " + " ".join(evil.split()) + " |"
