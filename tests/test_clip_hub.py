"""Downloads, from a hub inside this process: what is said and asked, how fast it fails."""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.errors import EntryNotFoundError

import clipattr.clip.hub
from clipattr.clip import load_clip
from clipattr.clip.hub import require_model, require_text_files
from clipattr.clip.names import CONFIG_FILE, WEIGHTS_FILE
from clipattr.errors import CheckpointError
from tests.tiny import save_tiny_clip

REPOSITORY = "some/model"
# The vocabulary of open_clip: merges of a model's own are read from local folders alone.
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves files by repository and name; `wait` seconds before every answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[str] = []
        self.wait = 0.0
        self.status = 200

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        repository, _, file = self.path.strip("/").partition("/resolve/main/")
        content = self.server.files.get((repository, file))
        time.sleep(self.server.wait)
        self.server.requests.append(f"{self.command} {file}")
        if self.server.status != 200:
            self.send_response(self.server.status)
        elif content is None:
            known = any(repository == owner for owner, _ in self.server.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        content = content or b""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    use(server.endpoint, tmp_path, monkeypatch)
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def use(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT and HF_HUB_CACHE do, which are read once per process."""
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{template}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)


@pytest.fixture
def served(hub: Hub, tmp_path: Path) -> str:
    """A model that the hub has; the name of the same model in a folder."""
    name = save_tiny_clip(tmp_path / "model", text_cfg=TEXT)
    for file in (tmp_path / "model").iterdir():
        hub.files[REPOSITORY, file.name] = file.read_bytes()
    return name


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("clipattr")]


def failure(name: str, pretrained: str | None = None) -> tuple[str, float]:
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_clip(name, pretrained=pretrained)
    return str(caught.value), time.perf_counter() - start


def test_model_of_the_hub_is_announced_and_loaded(
    hub: Hub, served: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "clipattr"):
        clip = load_clip(f"hf-hub:{REPOSITORY}")
    where = f"from {hub.endpoint}/{REPOSITORY}"
    assert said(caplog) == [
        f"downloading {CONFIG_FILE} {where}",
        f"downloading {WEIGHTS_FILE} {where}",
    ]
    assert clip.weights_sha256 == load_clip(served).weights_sha256


def test_cached_model_needs_no_connection(
    hub: Hub,
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    first = load_clip(f"hf-hub:{REPOSITORY}")
    use(free_endpoint(), tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO, "clipattr"):
        again = load_clip(f"hf-hub:{REPOSITORY}")
    assert again.weights_sha256 == first.weights_sha256
    assert said(caplog) == []


def free_endpoint() -> str:
    """Where nobody listens."""
    with Hub() as server:
        return server.endpoint


@pytest.mark.parametrize(
    ("name", "pretrained", "what"),
    [
        (f"hf-hub:{REPOSITORY}", None, f"{CONFIG_FILE} of {REPOSITORY}"),
        (
            "ViT-B-32",
            "laion2b_s34b_b79k",
            f"{WEIGHTS_FILE} of laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        ),
    ],
)
def test_no_connection_is_one_message_at_once(
    name: str, pretrained: str | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """huggingface_hub alone repeats for 23 seconds per file; open_clip asks for two."""
    endpoint = free_endpoint()
    use(endpoint, tmp_path, monkeypatch)
    message, seconds = failure(name, pretrained)
    assert seconds < 2
    asked = f"model.name={name!r}" + (f", model.pretrained={pretrained!r}" if pretrained else "")
    assert message.startswith(
        f"{asked} could not be loaded: {what} is not on this machine and could not be fetched "
        f"from {endpoint} (ConnectError: "
    )
    assert message.endswith(
        "model.name=local-dir:<folder>, or an architecture with model.pretrained=<file>"
    )
    assert message.count(what) == 1
    assert len(message.splitlines()) == 1


def test_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """A firewall that drops packets: the documented limit of huggingface_hub, once."""
    hub.wait = 1.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    message, seconds = failure(f"hf-hub:{REPOSITORY}")
    assert seconds < 0.9
    assert "Timeout" in message
    assert "HF_HUB_ETAG_TIMEOUT=0.2 seconds" in message


def test_offline_mode(hub: Hub, served: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message, _ = failure(f"hf-hub:{REPOSITORY}")
    assert "offline mode is enabled" in message
    assert hub.requests == []


@pytest.mark.parametrize("name", ["some/other", "some/model/more"])
def test_repository_that_is_not_there(hub: Hub, served: str, name: str):
    message, _ = failure(f"hf-hub:{name}")
    expected = {
        "some/other": f"{hub.endpoint} has no repository 'some/other', or shows it after",
        "some/model/more": "HFValidationError: Repo id must be in the form",
    }
    assert expected[name] in message


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_repository_without_a_model(hub: Hub, served: str, file: str):
    del hub.files[REPOSITORY, file]
    others = f"{file} or open_clip_pytorch_model.bin" if file == WEIGHTS_FILE else file
    message, _ = failure(f"hf-hub:{REPOSITORY}")
    assert message.endswith(f"{hub.endpoint}/{REPOSITORY} holds no {others}")


def test_one_of_the_weight_files_is_enough(hub: Hub, served: str):
    hub.files[REPOSITORY, "open_clip_pytorch_model.bin"] = hub.files.pop((REPOSITORY, WEIGHTS_FILE))
    require_model(f"hf-hub:{REPOSITORY}", None)


def test_hub_with_a_passing_trouble_is_left_to_the_retries(hub: Hub, served: str):
    hub.status = 503
    require_model(f"hf-hub:{REPOSITORY}", None)
    assert len(hub.requests) == 2


def test_tokenizer_of_the_hub(hub: Hub, served: str, tmp_path: Path):
    hub.files["some/text", "tokenizer.json"] = b"{}"
    hub.files["some/tower", "config.json"] = b"{}"
    require_text_files("ViT-B-32", {"hf_tokenizer_name": "some/text"})
    with pytest.raises(CheckpointError, match="some/tower holds no tokenizer_config.json or"):
        require_text_files("ViT-B-32", {"hf_tokenizer_name": "some/tower"})
    with pytest.raises(CheckpointError, match="some/text holds no config.json"):
        require_text_files("local-dir:x", {"hf_model_name": "some/text"})
    asked = len(hub.requests)
    # open_clip takes the tokenizer of a local folder from there, and folders are no repositories.
    require_text_files("local-dir:x", {"hf_tokenizer_name": "some/where"})
    require_text_files(
        "ViT-B-32", dict.fromkeys(("hf_tokenizer_name", "hf_model_name"), str(tmp_path))
    )
    require_text_files("ViT-B-32", {})
    assert len(hub.requests) == asked


def test_every_tag_asks_for_what_open_clip_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use("http://127.0.0.1:1", tmp_path, monkeypatch)
    asked: list[str] = []
    wanted: list[str] = []

    def record(url: str, **_options: object) -> None:
        asked.append(url)
        raise EntryNotFoundError

    def download(repo_id: str, filename: str, **_options: object) -> None:
        wanted.append(f"http://127.0.0.1:1/{repo_id}/resolve/main/{filename}")
        raise EntryNotFoundError

    monkeypatch.setattr(clipattr.clip.hub, "get_hf_file_metadata", record)
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    for name, tag in open_clip.list_pretrained():
        with pytest.raises(CheckpointError, match="holds no"):
            require_model(name, tag)
        with pytest.raises(FileNotFoundError):
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    assert asked == wanted
    assert len(asked) > 300
