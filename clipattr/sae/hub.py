"""SAEs on the Hugging Face hub: the two files of `save_sae`, and a card."""

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clipattr.errors import CheckpointError, ConfigError
from clipattr.redact import hide_secrets
from clipattr.sae.card import MARK, model_card
from clipattr.sae.files import load_sae

FILES = ("sae.json", "sae.safetensors")
CARD = "README.md"
_FOLDER = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


def push_sae(
    folder: Path | str,
    repo_id: str,
    *,
    path_in_repo: str = "",
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "An SAE of clipattr",
) -> str:
    """Upload the SAE that `save_sae` wrote into a folder; the URL of the commit.

    The repository is made if there is none (`private` is for that case), and so is the branch
    `revision`. A README that was not written here stays as it is. Without `token` it is that of
    `hf auth login` or HF_TOKEN. sae.json is uploaded as it is: what a name of a model in it shows,
    a local path for instance, is public then.

    Raises:
        CheckpointError: for a folder that holds no whole SAE, or when the hub refuses.
        ConfigError: for a name that no repository or folder can have.
    """
    folder, prefix = Path(folder), _prefix("path_in_repo", path_in_repo)
    load_sae(folder)  # nobody gets what this machine cannot load
    description = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    api = HfApi(token=token)
    with _explained(repo_id, revision, token):
        # With its owner, who is the user where the name says none.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files: dict[str, Path | bytes] = {name: folder / name for name in FILES}
        if _may_write_card(api, repo_id, prefix + CARD, revision):
            card = model_card(description, repo_id=repo_id, subfolder=path_in_repo, license=license)
            files[CARD] = card.encode()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(prefix + name, content) for name, content in files.items()],
            commit_message=commit_message,
            revision=revision,
        )
    return commit.commit_url


def pull_sae(
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | None = None,
    cache: Path | str | None = None,
) -> Path:
    """Download an SAE, unless it is in the cache; the folder for `load_sae`.

    `revision` is a branch, a tag or a commit: a commit is the same SAE for ever. `cache` is by
    default that of huggingface_hub, and is enough without a connection.

    Raises:
        CheckpointError: when the hub cannot be reached or refuses, or has no SAE there.
        ConfigError: for a name that no repository or folder can have.
    """
    prefix = _prefix("subfolder", subfolder)
    with _explained(repo_id, revision, token):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache,
            allow_patterns=[prefix + name for name in (*FILES, CARD)],
        )
    folder = Path(snapshot, subfolder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{constants.ENDPOINT}/{repo_id} holds no {' and no '.join(missing)} in "
            f"{subfolder or 'its top folder'}; subfolder=... names another"
        )
    return folder


def _prefix(name: str, folder: str) -> str:
    if not folder:
        return ""
    if not _FOLDER.fullmatch(folder):
        raise ConfigError(
            f"{name}={folder!r}: folders of letters, digits, '_', '-' and '.', separated by '/'"
        )
    return f"{folder}/"


def _may_write_card(api: HfApi, repo_id: str, path: str, revision: str | None) -> bool:
    """Whether there is no card, or one that was written here."""
    try:
        found = api.hf_hub_download(repo_id, path, revision=revision)
    except LocalEntryNotFoundError:  # of the same family, and says that nobody answers
        raise
    except EntryNotFoundError:
        return True
    return MARK in Path(found).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _explained(repo_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Every failure of the hub as one that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"repo_id={repo_id!r}: {_shorten(error, token)}") from error
    except Exception as error:
        raise CheckpointError(_explain(_cause_of(error), repo_id, revision, token)) from error


def _cause_of(error: BaseException) -> BaseException:
    """The answer of the hub, where a failed upload or a file that is not cached stands for it."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answers = [each for each in chain if isinstance(each, HfHubHTTPError)]
    hides_another = isinstance(error, LocalEntryNotFoundError) and len(chain) > 1
    return answers[0] if answers else chain[1 if hides_another else 0]


def _explain(error: BaseException, repo_id: str, revision: str | None, token: str | None) -> str:
    url, log_in = f"{constants.ENDPOINT}/{repo_id}", "`hf auth login`, HF_TOKEN or token=..."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"{url} is open to those who accepted its conditions there: do, and use {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{url} has no revision {revision or constants.DEFAULT_REVISION!r}"
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"{url} is not there, or not shown to you. Check the name; if it is private or yours "
            f"to write, use {log_in}"
        )
    if status == 403:
        return (
            f"{url}: the hub knows you and refuses (403). Use a token that may write to "
            f"repositories of {repo_id.partition('/')[0]!r}: {log_in}"
        )
    if status is not None:
        return f"{url}: the hub answered {status} ({_shorten(error, token)}); try again later"
    return (
        f"{url} could not be reached ({_shorten(error, token)}). Look at the connection, at "
        "HF_ENDPOINT and at HF_HUB_OFFLINE; without one, copy the folder and call load_sae"
    )


def _shorten(error: BaseException, token: str | None) -> str:
    text = hide_secrets(f"{type(error).__name__}: {error}")
    return textwrap.shorten(text.replace(token, "***") if token else text, 200)
