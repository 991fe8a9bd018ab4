"""Load any open_clip model: frozen, eval, with its own preprocessing and tokenizer.

Nothing is unpickled (safetensors, or torch.load with weights_only), and a model without its weights
is an error: open_clip itself only warns and goes on with random ones.
"""

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import open_clip
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from clipattr.errors import CheckpointError, ConfigError

BUNDLED = {"planted-world": Path(__file__).parent / "bundled"}
MERGES_FILE = "bpe_merges.txt.gz"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
LOCAL_DIR = "local-dir:"

Preprocess = Callable[[Image.Image], Float[Tensor, "channel height width"]]
Tokenizer = Callable[[list[str]], Int[Tensor, "prompt position"]]


@dataclass(frozen=True)
class Clip:
    """A frozen model with what belongs to it."""

    name: str
    model: nn.Module
    preprocess: Preprocess
    tokenizer: Tokenizer
    weights_sha256: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Clip":
        """Move the weights in place."""
        self.model.to(device)
        return self


def load_clip(
    name: str, *, pretrained: str | None = None, device: torch.device | str = "cpu"
) -> Clip:
    """Load a bundled name, an open_clip architecture, `hf-hub:<id>` or `local-dir:<folder>`.

    Args:
        name: what to load.
        pretrained: weight tag or local checkpoint file; needed with an architecture name only.
        device: where the weights go.
    """
    resolved = _resolve(name, pretrained)
    try:
        with _quiet_open_clip(), warnings.catch_warnings():
            # Another activation function than the one in training gives wrong features silently.
            warnings.filterwarnings("error", ".*QuickGELU mismatch.*")
            model, _, preprocess = open_clip.create_model_and_transforms(
                resolved, pretrained=pretrained, require_pretrained=True
            )
    except Exception as error:
        raise CheckpointError(
            f"model {name!r} (pretrained={pretrained!r}) could not be loaded: {error}. "
            f"Offline, name a folder with {CONFIG_FILE} and weights: local-dir:<folder>"
        ) from error
    model.requires_grad_(False).eval().to(device)
    return Clip(
        name=name,
        model=model,
        preprocess=cast(Preprocess, preprocess),
        tokenizer=_tokenizer(resolved),
        weights_sha256=hash_weights(model),
    )


def build_clip(architecture: str) -> tuple[nn.Module, Preprocess, Tokenizer]:
    """An untrained model of a bundled name or of a folder with an open_clip_config.json."""
    folder = architecture_folder(architecture)
    with _quiet_open_clip():
        model, _, preprocess = open_clip.create_model_and_transforms(
            f"{LOCAL_DIR}{folder}", load_weights=False
        )
    return model, cast(Preprocess, preprocess), _tokenizer(f"{LOCAL_DIR}{folder}")


def architecture_folder(architecture: str) -> Path:
    """Where the open_clip_config.json of a bundled name or a folder lies."""
    folder = BUNDLED.get(architecture, Path(architecture))
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"clip.architecture={architecture!r}: no {CONFIG_FILE} found there; name one of "
            f"{sorted(BUNDLED)} or a folder that holds one"
        )
    return folder


def local_files(name: str, pretrained: str | None) -> list[Path]:
    """The files of a bundled model, a local folder or a local checkpoint; none of a remote one."""
    if pretrained is not None:
        return [Path(pretrained)] if Path(pretrained).is_file() else []
    resolved = f"{LOCAL_DIR}{BUNDLED[name]}" if name in BUNDLED else name
    if not resolved.startswith(LOCAL_DIR):
        return []
    folder = Path(resolved.removeprefix(LOCAL_DIR))
    return sorted(path for path in folder.glob("*") if path.is_file())


def hash_weights(model: nn.Module) -> str:
    """sha256 over the names and the bytes of all weights, on whatever device they are."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resolve(name: str, pretrained: str | None) -> str:
    has_weights = name in BUNDLED or name.startswith((LOCAL_DIR, "hf-hub:"))
    if has_weights and pretrained is not None:
        # open_clip would only warn, and load other weights than the ones that were asked for.
        raise ConfigError(
            f"model.name={name!r} brings its own weights: model.pretrained={pretrained!r} is "
            "allowed with an open_clip architecture only"
        )
    if name in BUNDLED:
        return f"{LOCAL_DIR}{BUNDLED[name]}"
    if name.startswith(LOCAL_DIR):
        _check_folder(name)
        return name
    if name.startswith("hf-hub:"):
        return name
    known = open_clip.list_models()
    if name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, [*known, *BUNDLED], n=3, cutoff=0.4)
        raise ConfigError(
            f"model.name={name!r} is unknown; nearest: {', '.join(near) or 'none'}. Allowed: "
            f"{', '.join(BUNDLED)}, an open_clip architecture, hf-hub:<id> or local-dir:<folder>"
        )
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"model.name={name!r} needs model.pretrained: one of {', '.join(tags) or '(no tags)'}, "
            "or a local checkpoint file"
        )
    return name


def _check_folder(name: str) -> None:
    folder = Path(name.removeprefix(LOCAL_DIR))
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = "the folder exists" if folder.is_dir() else "the folder does not exist"
        raise ConfigError(f"model.name={name!r}: {path} is missing ({found})")
    try:
        json.loads(path.read_text())["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:  # no JSON, no such key, no object
        raise ConfigError(f"model.name={name!r}: {path} holds no valid model_cfg") from error


def _tokenizer(resolved: str) -> Tokenizer:
    # open_clip has no field for a merges file inside a local folder, only a constructor argument.
    merges = Path(resolved.removeprefix(LOCAL_DIR)) / MERGES_FILE
    has_merges = resolved.startswith(LOCAL_DIR) and merges.is_file()
    with _quiet_open_clip():
        config = open_clip.get_model_config(resolved) or {}
        options = config.get("text_cfg", {}).get("tokenizer_kwargs", {})
        if options.get("trust_remote_code"):
            raise CheckpointError(
                f"{resolved}: its config sets tokenizer_kwargs.trust_remote_code, which would run "
                "code of the model's folder; clipattr runs none"
            )
        if has_merges:
            return open_clip.get_tokenizer(resolved, bpe_path=str(merges))
        return open_clip.get_tokenizer(resolved)


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip narrates its loading on the root logger; errors still reach the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
