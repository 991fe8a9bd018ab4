"""Load any open_clip model: frozen, eval, with its own preprocessing and tokenizer.

Nothing is unpickled (safetensors, or torch.load with weights_only), and a model without its weights
is an error: open_clip itself only warns and goes on with random ones.
"""

import hashlib
import importlib.util
import logging
import math
import os
import pickle
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import AttentionalPooler, TextTransformer
from PIL import Image
from torch import Tensor, nn

from clipattr.clip.hub import require_model, require_text_files
from clipattr.clip.names import (
    LOCAL_DIR,
    MERGES_FILE,
    architecture_folder,
    resolve_name,
)
from clipattr.clip.texts import find_text_trunk
from clipattr.clip.tower import Tower
from clipattr.errors import CheckpointError, ConfigError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNPICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

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
    precision: str
    d_embed: int
    """width of the embedding"""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute in, layer norms of open_clip's own towers aside (float32)."""
        return PRECISIONS[self.precision]

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied with; beside a timm tower its logarithm is in `dtype`."""
        return math.exp(float(cast(Tensor, self.model.logit_scale)))

    @property
    def logit_bias(self) -> float | None:
        """What is added to a scaled cosine, by models whose probability is a sigmoid (SigLIP)."""
        bias = cast(Tensor | None, self.model.logit_bias)
        return None if bias is None else float(bias)

    def to(self, device: torch.device | str) -> "Clip":
        """Move the weights in place."""
        self.model.to(device)
        return self

    def encode_image(
        self, images: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image embed"]:
        """Embeddings before normalisation, of any open_clip model; images are cast and moved."""
        encode = cast(Callable[..., Tensor], self.model.encode_image)
        return encode(images.to(self.device, self.dtype), normalize=False)

    def encode_text(self, tokens: Int[Tensor, "prompt position"]) -> Float[Tensor, "prompt embed"]:
        """Embeddings before normalisation, of what `tokenizer` makes.

        A tower that can be cut reads a batch no further than the end of its longest prompt.
        """
        tokens = tokens.to(self.device)
        if trunk := find_text_trunk(self.model):
            return Tower(trunk).embed(tokens)
        encode = cast(Callable[..., Tensor], self.model.encode_text)
        return encode(tokens, normalize=False)


def load_clip(
    name: str,
    *,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Clip:
    """Load a bundled name, an open_clip architecture, `hf-hub:<id>` or `local-dir:<folder>`.

    Args:
        name: what to load.
        pretrained: weight tag or local checkpoint file; needed with an architecture name only.
        precision: of the weights, fp32, bf16 or fp16; layer norms are as open_clip has them.
        device: where the weights go.

    Raises:
        ConfigError: a name, a tag or a package that does not exist; no weights were downloaded.
        CheckpointError: weights that are missing, unreachable, broken or of another model.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"model.precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    if os.environ.get(UNPICKLE, "0") != "0":
        # open_clip repeats a load that ends in a TypeError, without its own weights_only.
        raise ConfigError(f"{UNPICKLE} is set: a file of weights could run code. Unset it")
    resolved = resolve_name(name, pretrained)
    asked = f"model.name={name!r}" + (f", model.pretrained={pretrained!r}" if pretrained else "")
    with _loading(asked):
        require_model(resolved, pretrained)
        config = open_clip.get_model_config(resolved) or {}
        text = config.get("text_cfg", {})
        _check_text(text)
        require_text_files(resolved, text)
        with _quiet_open_clip():
            model, _, preprocess = open_clip.create_model_and_transforms(
                resolved, pretrained=pretrained, precision=precision, require_pretrained=True
            )
        tokenizer = _build_tokenizer(resolved, model)
    _lower_the_rest(model, PRECISIONS[precision])
    model.requires_grad_(False).eval().to(device)
    return Clip(
        name=name,
        model=model,
        preprocess=cast(Preprocess, preprocess),
        tokenizer=tokenizer,
        weights_sha256=hash_weights(model),
        precision=precision,
        d_embed=int(config["embed_dim"]),
    )


def build_clip(architecture: str) -> tuple[nn.Module, Preprocess, Tokenizer]:
    """An untrained model of a bundled name or of a folder with an open_clip_config.json."""
    resolved = f"{LOCAL_DIR}{architecture_folder(architecture)}"
    with _loading(f"clip.architecture={architecture!r}"):
        with _quiet_open_clip():
            model, _, preprocess = open_clip.create_model_and_transforms(
                resolved, load_weights=False
            )
        return model, cast(Preprocess, preprocess), _build_tokenizer(resolved, model)


def hash_weights(model: nn.Module) -> str:
    """sha256 over the names and the bytes of all weights, and over the kind of every module.

    Equal weights compute something else with another activation function or number of heads.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__name__} {getattr(module, 'num_heads', '')}".encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_text(text: Mapping[str, Any]) -> None:
    if text.get("tokenizer_kwargs", {}).get("trust_remote_code"):
        raise CheckpointError(
            "its config sets tokenizer_kwargs.trust_remote_code, which would run code of the "
            "model's folder; clipattr runs none"
        )
    needs_package = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if needs_package and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"its text side ({needs_package}) needs the package transformers: "
            "pip install 'clipattr[hf]'"
        )


def _lower_the_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what open_clip's `precision` forgets; CoCa and transformers text towers would crash."""
    for module in model.modules():
        if isinstance(module, HFTextEncoder):
            module.to(dtype)
        elif isinstance(module, (AttentionalPooler, TextTransformer)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _build_tokenizer(resolved: str, model: nn.Module) -> Tokenizer:
    # open_clip has no field for a merges file inside a local folder, only a constructor argument.
    merges = Path(resolved.removeprefix(LOCAL_DIR)) / MERGES_FILE
    has_merges = resolved.startswith(LOCAL_DIR) and merges.is_file()
    with _quiet_open_clip():
        if has_merges:
            tokenizer = open_clip.get_tokenizer(resolved, bpe_path=str(merges))
        else:
            tokenizer = open_clip.get_tokenizer(resolved)
    known = cast(int, getattr(model, "text", model).vocab_size)
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.vocab_size > known:
        raise CheckpointError(
            f"its tokenizer has {tokenizer.vocab_size} tokens and its text tower knows {known}: "
            f"the merges of its own vocabulary are read from a {LOCAL_DIR} folder, as {MERGES_FILE}"
        )
    return tokenizer


@contextmanager
def _loading(asked: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one readable message."""
    try:
        yield
    except Exception as error:
        kind = ConfigError if isinstance(error, ConfigError) else CheckpointError
        raise kind(f"{asked} could not be loaded: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    if isinstance(error, (ConfigError, CheckpointError)):
        return str(error)
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        return (
            "its file is neither safetensors nor tensors saved by torch.save, and nothing is "
            "executed here, as a pickle or TorchScript would be. Where you trust it, convert it: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    # open_clip and torch list every weight that does not fit.
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip narrates its loading on the root logger, and repeats there what it raises."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(TorchScript archive|pickle protocol)")
            yield
    finally:
        logging.disable(previous)
