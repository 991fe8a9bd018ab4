"""What has to be downloaded is said in advance, and a dead connection is noticed at once.

Without a connection, huggingface_hub asks six times for each file, waits up to a minute for each
answer, and knows no setting for less. One request with its documented time limit comes first.
"""

import logging
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from clipattr.clip.names import CONFIG_FILE, HUB, LOCAL_DIR, WEIGHTS_FILES
from clipattr.errors import CheckpointError

logger = logging.getLogger(__name__)


def require_model(resolved: str, pretrained: str | None) -> None:
    """Raise CheckpointError when the weights are neither on this machine nor to be had."""
    if resolved.startswith(HUB):
        repository = resolved.removeprefix(HUB)
        _require(repository, (CONFIG_FILE,))
        _require(repository, WEIGHTS_FILES)
    elif pretrained is not None:
        location = open_clip.get_pretrained_cfg(resolved, pretrained).get("hf_hub")
        if location:
            repository, file = os.path.split(location)
            files = (file.replace(".bin", ".safetensors"), file) if file else WEIGHTS_FILES
            _require(repository, files)


def require_text_files(resolved: str, text: Mapping[str, Any]) -> None:
    """The same for a tokenizer and a text tower of the transformers package."""
    tokenizer, tower = text.get("hf_tokenizer_name"), text.get("hf_model_name")
    if tokenizer and not resolved.startswith(LOCAL_DIR) and not os.path.isdir(tokenizer):
        _require(tokenizer, ("tokenizer_config.json", "tokenizer.json"))
    if tower and not os.path.isdir(tower):
        _require(tower, ("config.json",))


def _require(repository: str, files: Sequence[str]) -> None:
    """One of the files is in the cache, or the hub has it."""
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    endpoint, limit = constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT
    logger.info("downloading %s from %s/%s", files[0], endpoint, repository)
    try:
        for file in files:
            try:
                get_hf_file_metadata(hf_hub_url(repository, file), timeout=limit)
            except EntryNotFoundError:
                continue
            return
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{endpoint} has no repository {repository!r}, or shows it after `hf auth login` only"
        ) from error
    except HfHubHTTPError:
        return  # It answers; what passes is worth the retries of the download itself.
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise CheckpointError(
            f"{files[0]} of {repository} is not on this machine and could not be fetched from "
            f"{endpoint} ({reason}; HF_HUB_ETAG_TIMEOUT={limit} seconds). Without a connection: "
            f"model.name={LOCAL_DIR}<folder>, or an architecture with model.pretrained=<file>"
        ) from error
    raise CheckpointError(f"{endpoint}/{repository} holds no {' or '.join(files)}")
