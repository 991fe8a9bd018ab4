"""Prompts as heads: unit text embeddings whose cosine with an image is the score of a class."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from clipattr.clip.loading import Clip
from clipattr.clip.templates import SLOT, TEMPLATES
from clipattr.errors import CheckpointError, ConfigError
from clipattr.files import SCHEMA_VERSION, load_weights, save_weights

# A killed run loses this many prompts at most: with 80 templates the prompts of 12 classes.
_CHUNK_PROMPTS = 1024


@dataclass(frozen=True)
class TextHead:
    """One unit row per class, and the model's own scale and bias of a cosine."""

    names: tuple[str, ...]
    weights: Float[Tensor, "head embed"]
    logit_scale: float
    logit_bias: float | None

    def scores(self, embeddings: Float[Tensor, "*batch embed"]) -> Float[Tensor, "*batch head"]:
        """Cosines with the embeddings, which need not be normalised."""
        dtype = torch.promote_types(embeddings.dtype, self.weights.dtype)
        return normalize(embeddings.to(dtype), dim=-1) @ self.weights.to(dtype).T

    def logits(self, embeddings: Float[Tensor, "*batch embed"]) -> Float[Tensor, "*batch head"]:
        """The model's own logits: scale * cosine, plus the bias where it has one."""
        logits = self.logit_scale * self.scores(embeddings)
        return logits if self.logit_bias is None else logits + self.logit_bias

    @property
    def is_sigmoid(self) -> bool:
        """Whether every class has a probability of its own, as in SigLIP."""
        return self.logit_bias is not None

    def probabilities(
        self, embeddings: Float[Tensor, "*batch embed"]
    ) -> Float[Tensor, "*batch head"]:
        """softmax(scale * cosine) over the classes; sigmoid(scale * cosine + bias) of each class.

        The second where the model was trained with a bias: the classes of SigLIP are independent.
        Reference: Zhai et al. 2023, Sigmoid loss for language image pre-training.
        """
        logits = self.logits(embeddings)
        return logits.sigmoid() if self.is_sigmoid else logits.softmax(dim=-1)


def text_head(
    clip: Clip,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES["simple"],
    batch_size: int = 256,
    cache: Path | None = None,
    progress: bool = False,
) -> TextHead:
    """One row per class: the mean of the unit embeddings of its prompts, normalised again.

    Args:
        clip: the model.
        class_names: each once.
        templates: prompts with {} in the place of the class name, as `load_templates` gives them.
        batch_size: prompts per forward.
        cache: folder in which rows are kept, named by the hash of all that they are made from.
        progress: show a bar.
    """
    _check_words(class_names, templates)
    step = max(1, _CHUNK_PROMPTS // len(templates))
    n_prompts = len(class_names) * len(templates)
    rows: list[Tensor] = []
    with tqdm(total=n_prompts, desc="prompts", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(class_names), step):
            chunk = class_names[start : start + step]
            prompts = [template.replace(SLOT, name) for name in chunk for template in templates]
            rows.append(_cached_rows(clip, prompts, len(templates), batch_size, cache, bar))
    weights = torch.cat(rows).to(clip.device)
    return TextHead(tuple(class_names), weights, clip.logit_scale, clip.logit_bias)


def prompt_head(clip: Clip, prompts: Sequence[str], *, batch_size: int = 256) -> TextHead:
    """Any prompts as heads, each with its own words."""
    return text_head(clip, prompts, templates=TEMPLATES["none"], batch_size=batch_size)


def embed_prompts(
    clip: Clip, prompts: list[str], *, batch_size: int = 256
) -> Float[Tensor, "prompt embed"]:
    """One unit row per prompt, float32 whatever the model's precision."""
    if not prompts:
        raise ConfigError("no prompts: name at least one")
    return _unit_rows(clip, clip.tokenizer(prompts), batch_size, None)


def _cached_rows(
    clip: Clip,
    prompts: list[str],
    n_templates: int,
    batch_size: int,
    cache: Path | None,
    bar: tqdm,
) -> Float[Tensor, "class embed"]:
    """The rows of consecutive classes, embedded unless they are in the cache."""
    tokens = clip.tokenizer(prompts)
    stem = _content_hash(clip, tokens, n_templates)
    if cache is not None and (cache / f"{stem}.json").exists():
        bar.update(len(prompts))
        return _read_rows(cache, stem)
    units = _unit_rows(clip, tokens, batch_size, bar).unflatten(0, (-1, n_templates))
    rows = normalize(units.mean(dim=1), dim=-1).cpu()
    if cache is not None:
        save_weights(cache, stem, {"rows": rows}, {})
    return rows


def _read_rows(cache: Path, stem: str) -> Float[Tensor, "class embed"]:
    try:
        tensors, _ = load_weights(cache, stem, {SCHEMA_VERSION: frozenset()})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; delete {cache / stem}.* to embed the prompts again"
        ) from error
    return tensors["rows"]


def _unit_rows(
    clip: Clip, tokens: Int[Tensor, "prompt position"], batch_size: int, bar: tqdm | None
) -> Float[Tensor, "prompt embed"]:
    rows: list[Tensor] = []
    with torch.no_grad():
        for batch in tokens.split(batch_size):
            rows.append(normalize(clip.encode_text(batch).float(), dim=-1))
            if bar is not None:
                bar.update(len(batch))
    units = torch.cat(rows)
    if not units.isfinite().all():
        raise ConfigError(
            f"model.precision={clip.precision} of model {clip.name!r}: its text embeddings are "
            "not finite; fp32 or bf16 have the range"
        )
    return units


def _content_hash(clip: Clip, tokens: Int[Tensor, "prompt position"], n_templates: int) -> str:
    """All that decides the rows."""
    made_from = {
        "weights": clip.weights_sha256,
        "precision": clip.precision,
        "templates": n_templates,
        "tokens": list(tokens.shape),
    }
    digest = hashlib.sha256(json.dumps(made_from).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_words(class_names: Sequence[str], templates: Sequence[str]) -> None:
    if not class_names or not templates:
        raise ConfigError(
            f"{len(class_names)} class names, {len(templates)} templates: name at least one"
        )
    blank = [number for number, name in enumerate(class_names) if not name.strip()]
    if blank:
        raise ConfigError(f"class name {blank[0]} is empty")
    repeated = [name for name, times in Counter(class_names).items() if times > 1]
    if repeated:
        raise ConfigError(f"class names that stand twice: {', '.join(repeated)}")
    for template in templates:
        if SLOT not in template:
            raise ConfigError(f"template {template!r} has no {SLOT}, the place of the class name")
