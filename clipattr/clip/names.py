"""What a model name means. What is wrong with it is said before anything is downloaded."""

import difflib
import json
from pathlib import Path

import open_clip

from clipattr.errors import CheckpointError, ConfigError

BUNDLED = {"planted-world": Path(__file__).parent / "bundled"}
MERGES_FILE = "bpe_merges.txt.gz"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.bin")
LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"

# What open_clip looks for in a folder.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")


def resolve_name(name: str, pretrained: str | None) -> str:
    """What open_clip calls the model; a ConfigError when name and weights cannot go together."""
    resolved = f"{LOCAL_DIR}{BUNDLED[name]}" if name in BUNDLED else name
    if resolved.startswith((LOCAL_DIR, HUB)):
        if pretrained is not None:
            # open_clip would only warn, and load other weights than the ones that were asked for.
            raise ConfigError(
                f"model.name={name!r} brings its own weights: model.pretrained={pretrained!r} is "
                "allowed with an open_clip architecture only"
            )
        if resolved.startswith(LOCAL_DIR):
            _check_folder(resolved)
        return resolved
    architecture = name.replace("/", "-")
    if architecture not in open_clip.list_models():
        raise ConfigError(
            f"model.name={name!r} is unknown; nearest: {', '.join(_nearest(name)) or 'none'}. "
            f"Allowed: {', '.join(BUNDLED)}, an open_clip architecture with model.pretrained "
            f"(a tag or a file), {HUB}<id> or {LOCAL_DIR}<folder>"
        )
    _check_weights(architecture, pretrained)
    return architecture


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


def _nearest(name: str) -> list[str]:
    if Path(name).is_dir():
        return [f"{LOCAL_DIR}{name}"]
    prefix, colon, rest = name.partition(":")
    if colon and (close := difflib.get_close_matches(f"{prefix.lower()}:", (LOCAL_DIR, HUB), n=1)):
        return [f"{close[0]}{rest}"]
    known = {word.lower(): word for word in [*open_clip.list_models(), *BUNDLED]}
    near = [known[word] for word in difflib.get_close_matches(name.lower(), known, cutoff=0.4)]
    return [*near, f"{HUB}{name}"] if name.count("/") == 1 else near


def _check_weights(architecture: str, pretrained: str | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        raise ConfigError(
            f"model.name={architecture!r} needs model.pretrained: one of "
            f"{', '.join(tags) or '(no tags)'}, or a local checkpoint file"
        )
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        _check_activation(architecture, pretrained)
        return
    path = Path(pretrained)
    if path.is_file():
        return
    if path.is_dir():
        files = ", ".join(file.name for file in _weights_in(path)) or f"no {_allowed_suffixes()}"
        raise ConfigError(
            f"model.pretrained={pretrained!r} is a folder, which holds {files}: name the file, "
            f"or the folder alone with model.name={LOCAL_DIR}{pretrained}"
        )
    word = pretrained.lower().replace("-", "_")
    others = open_clip.list_pretrained_models_by_tag(pretrained)
    owners = difflib.get_close_matches(architecture, others, cutoff=0.0)
    raise ConfigError(
        f"model.pretrained={pretrained!r} is neither a file nor a tag of {architecture!r}; "
        f"nearest tags: {', '.join(difflib.get_close_matches(word, tags) or tags) or 'none'}"
        + (f". It is a tag of {', '.join(owners)}" if owners else "")
    )


def _check_activation(architecture: str, tag: str) -> None:
    """Another activation function than the one in training gives wrong features silently."""
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    trained_with = weights.get("quick_gelu", False)
    has = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
    if trained_with == has:
        return
    twin = f"{architecture}-quickgelu"
    # The configuration in the repository of the weights belongs to them.
    right = twin if twin in open_clip.list_models() else f"{HUB}{weights['hf_hub'].strip('/')}"
    words = {True: "QuickGELU", False: "GELU"}
    raise ConfigError(
        f"model.name={architecture!r} has {words[has]} activations, and model.pretrained={tag!r} "
        f"was trained with {words[trained_with]}: the features would be wrong. Use "
        f"model.name={right}"
    )


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
    weights = [file.name for file in _weights_in(folder)]
    if not weights:
        found = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise CheckpointError(
            f"model.name={name!r}: no file there ends with {_allowed_suffixes()} (found {found})"
        )
    if len(weights) > 1 and not any(file.startswith("open_clip_") for file in weights):
        # open_clip would take the first in the alphabet.
        raise CheckpointError(
            f"model.name={name!r}: several files hold weights ({', '.join(weights)}); call the "
            f"right one {' or '.join(WEIGHTS_FILES)}"
        )


def _weights_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)


def _allowed_suffixes() -> str:
    return " or ".join(_WEIGHT_SUFFIXES)
