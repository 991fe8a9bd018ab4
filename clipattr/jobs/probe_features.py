"""What heads read of images: embedding, activations at a site, SAE codes, several side by side.

From image shards through the cache, where CLIP runs once per image for all that is missing; or of
pixels, as `predict` has them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from clipattr.clip import Clip, Tower, image_tower
from clipattr.codes import SparseCodes, pool_tokens
from clipattr.config.choices import Stream, Tokens
from clipattr.config.inputs import ReadConfig, SiteConfig
from clipattr.data import ActivationStore, BadSample, Ranks
from clipattr.data.draw import draw_tokens
from clipattr.data.store import hash_json
from clipattr.errors import CheckpointError, ConfigError
from clipattr.files import read_sha256
from clipattr.jobs.model import SiteEncoder, SiteTokens, find_site, read_embeddings, read_sites
from clipattr.jobs.shards import Images
from clipattr.probes.features import (
    CodesPart,
    EmbeddingPart,
    FeatureSpec,
    Part,
    SitePart,
    parse_features,
)
from clipattr.sae import load_sae
from clipattr.sae.sae import Sae

Features = Float[Tensor, "image *token column"] | SparseCodes
"""Vectors, tokens or codes; one row, or one set of rows, per image."""

# Images whose tokens are in memory at a time, where they are pooled or encoded.
_CHUNK = 1024
_EMBEDDING = "embedding"


class FeatureRows(NamedTuple):
    """Features of images in the order of the shards; x[r] belongs to image `images[r]`."""

    x: Features
    images: Int[Tensor, " row"]
    fingerprint: str
    """what the cached activations were made from"""
    bad: list[BadSample]
    """images that could not be decoded"""


class FeatureReader:
    """Computes the feature that a spec describes, of one model."""

    def __init__(self, spec: FeatureSpec, clip: Clip, sae: Sae | None = None) -> None:
        """`sae` is that of a part of codes. Use `open_reader` for what a file says."""
        if (spec.codes is None) != (sae is None):
            raise ConfigError(f"feature {spec}: an SAE goes with codes, and with nothing else")
        self.spec = spec
        self.clip = clip
        self.sae = None if sae is None else sae.requires_grad_(False).to(clip.device)
        self._sites = self._find_sites()

    @property
    def width(self) -> int:
        """Columns of a row; of codes the latents, and behind them the columns of other parts."""
        return sum(self._width_of(part) for part in self.spec.parts)

    def stores(
        self,
        images: Images,
        data: ReadConfig,
        *,
        ranks: Ranks = Ranks(),  # noqa: B008  immutable
        progress: bool,
    ) -> dict[str, ActivationStore]:
        """The cached activations that all parts are made of; what is missing is written first."""
        if self._sites:
            stores = read_sites(
                self.clip,
                SiteEncoder(self._sites),
                images.usable,
                data,
                ranks=ranks,
                progress=progress,
            )
        else:
            found = read_embeddings(self.clip, images.usable, data, ranks=ranks, progress=progress)
            stores = {_EMBEDDING: found}
        images.add_bad(next(iter(stores.values())).bad, data.max_bad_fraction)
        return stores

    @torch.no_grad()
    def of_shards(
        self,
        images: Images,
        data: ReadConfig,
        *,
        ranks: Ranks = Ranks(),  # noqa: B008  immutable
        progress: bool,
    ) -> FeatureRows:
        """Of all images of shards, in memory."""
        stores = self.stores(images, data, ranks=ranks, progress=progress)
        orders = {name: store.rows_by_image() for name, store in stores.items()}
        name, first = next(iter(stores.items()))
        rows = first.load("images").long()[orders[name]][:: first.tokens]
        chunks: list[Tensor | SparseCodes] = []
        whole = {name: store.load() for name, store in stores.items() if store.tokens == 1}
        for start in range(0, len(rows), _CHUNK):
            raw: dict[str, Tensor] = {}
            for name, store in stores.items():
                chosen = orders[name][start * store.tokens : (start + _CHUNK) * store.tokens]
                x = whole[name][chosen] if name in whole else store.read(chosen)
                is_vector = name == _EMBEDDING or self._sites[name].cut.site.tokens == "cls"
                raw[name] = x if is_vector else x.unflatten(0, (-1, store.tokens))
            chunks.append(self._assemble(raw))
        return FeatureRows(_join(chunks), rows, _fingerprint(stores), first.bad)

    @torch.no_grad()
    def of_images(
        self, images: Float[Tensor, "image channel height width"], keys: Sequence[str]
    ) -> Features:
        """Of normalised pixels; the keys of the samples decide which tokens are drawn, if any."""
        images = images.to(self.clip.device, self.clip.dtype)
        if not self._sites:
            return self._assemble({_EMBEDDING: self.clip.encode_image(images)})
        raw = SiteEncoder(self._sites)(images, list(self._sites))
        for name, site in self._sites.items():
            if site.drawn is not None:
                tokens = draw_tokens(keys, site.tokens, site.drawn).to(raw[name].device)
                raw[name] = raw[name].take_along_dim(tokens[:, :, None], dim=1)
        return self._assemble(raw)

    def cut_sites(self) -> dict[str, SiteTokens]:
        """Where a tower is cut for it, by name."""
        tower = image_tower(self.clip.model)
        return {_name_of(part): _find(tower, part) for part in self.spec.parts}

    def _find_sites(self) -> dict[str, SiteTokens]:
        """Sites by name; none where it is the embedding alone, which any model has."""
        if all(isinstance(part, EmbeddingPart) for part in self.spec.parts):
            return {}
        return self.cut_sites()

    def _width_of(self, part: Part) -> int:
        match part:
            case EmbeddingPart():
                return self.clip.d_embed
            case SitePart():
                return self._sites[_name_of(part)].cut.d_site
            case CodesPart():
                return part.n_latents

    def _assemble(self, raw: Mapping[str, Tensor]) -> Features:
        """The parts side by side, on the CPU."""
        dense: list[Tensor] = []
        codes: SparseCodes | None = None
        for part in self.spec.parts:
            x = raw[_name_of(part)]
            match part:
                case EmbeddingPart():
                    x = normalize(x.float(), dim=-1) if part.is_normalised else x.float()
                    dense.append(x.cpu())
                case SitePart(pool="mean"):
                    dense.append(x.float().mean(dim=1).cpu())
                case SitePart():
                    # Tokens are many: they are widened where they are used.
                    dense.append(x.cpu() if self.spec.has_tokens else x.float().cpu())
                case CodesPart():
                    codes = self._encode(x, part)
        if codes is not None:
            return _beside(codes, dense)
        return dense[0] if self.spec.has_tokens else torch.cat(dense, dim=1)

    def _encode(self, x: Tensor, part: CodesPart) -> SparseCodes:
        assert self.sae is not None, "checked at the start"
        codes = self.sae.encode(x.to(self.clip.device).float())
        pooled = codes if part.pool == "none" else pool_tokens(codes, part.pool)
        # A slot that is silent has no meaning; its index must not be one of a later part.
        indices = pooled.indices.where(pooled.is_active, 0)
        return SparseCodes(indices.cpu(), pooled.values.float().cpu(), pooled.n_latents)


def fill_cache(
    readers: Sequence[FeatureReader], images: Images, data: ReadConfig, *, progress: bool
) -> None:
    """CLIP runs once per image for all that several readers of one model will read."""
    sites = {name: site for reader in readers for name, site in reader.cut_sites().items()}
    read_sites(readers[0].clip, SiteEncoder(sites), images.usable, data, progress=progress)


def open_reader(feature: str, clip: Clip, sae: str | None = None) -> FeatureReader:
    """The reader of what ProbeRecord.feature says; `sae` is the folder of the SAE of its codes."""
    spec = parse_features(feature)
    if spec.codes is None:
        return FeatureReader(spec, clip)
    if sae is None:
        raise ConfigError(f"the probe reads {feature}: name the folder of that SAE, sae=FOLDER")
    found = read_sha256(Path(sae), "sae")
    if found != spec.codes.sae:
        raise CheckpointError(
            f"{sae}: sha256 of its tensors is {found}; the probe reads codes of {spec.codes.sae}"
        )
    return FeatureReader(spec, clip, load_sae(sae, expected_model=_model(clip))[0])


def describe_site(clip: Clip, site: SiteConfig, *, keep_tokens: bool) -> SitePart:
    """The part of a site of a config; tokens are averaged unless they are kept."""
    cut = find_site(image_tower(clip.model), site).cut
    place = cut.site
    pool = "none" if keep_tokens or place.tokens == "cls" else "mean"
    return SitePart(place.layer, place.stream, place.tokens, site.tokens_per_image, pool)


def describe_codes(clip: Clip, folder: str, pool: str) -> tuple[CodesPart, Sae]:
    """The part of the codes of an SAE, and the SAE."""
    sae, record = load_sae(folder, expected_model=_model(clip))
    site = dict(record.site)
    pool = "none" if site["tokens"] == "cls" else pool
    sha256 = read_sha256(Path(folder), "sae")
    return CodesPart(**site, n_latents=sae.n_latents, sae=sha256, pool=pool), sae  # type: ignore[arg-type]


def _find(tower: Tower, part: Part) -> SiteTokens:
    if isinstance(part, EmbeddingPart):
        return find_site(tower, SiteConfig(stream=Stream.embedding))
    drawn = part.drawn if isinstance(part, SitePart) else None
    site = SiteConfig(part.layer, Stream[part.stream], Tokens[part.tokens], drawn)
    return find_site(tower, site)


def _name_of(part: Part) -> str:
    """Parts of one name are made of the same activations."""
    if isinstance(part, EmbeddingPart):
        return _EMBEDDING
    drawn = part.drawn if isinstance(part, SitePart) else None
    return f"{part.layer}-{part.stream}-{part.tokens}-{drawn}"


def _fingerprint(stores: Mapping[str, ActivationStore]) -> str:
    found = [store.fingerprint for store in stores.values()]
    return hash_json(found[0] if len(found) == 1 else found)


def _model(clip: Clip) -> dict[str, str]:
    return {"name": clip.name, "weights_sha256": clip.weights_sha256}


def _beside(codes: SparseCodes, dense: list[Tensor]) -> SparseCodes:
    """Columns of vectors behind the latents, each always active."""
    indices, values, n_columns = codes
    for x in dense:
        columns = torch.arange(n_columns, n_columns + x.shape[1])
        indices = torch.cat([indices, columns.expand(len(x), -1)], dim=1)
        values = torch.cat([values, x], dim=1)
        n_columns += x.shape[1]
    return SparseCodes(indices, values, n_columns)


def _join(chunks: Sequence[Tensor | SparseCodes]) -> Features:
    """Rows of chunks, one after the other; codes are padded to the fullest row."""
    codes = [one for one in chunks if isinstance(one, SparseCodes)]
    if not codes:
        return torch.cat([one for one in chunks if isinstance(one, Tensor)])
    n_slots = max(one.indices.shape[1] for one in codes)
    indices, values = (
        torch.cat([pad(each, (0, n_slots - each.shape[1])) for each in column])
        for column in ([one.indices for one in codes], [one.values for one in codes])
    )
    return SparseCodes(indices, values, codes[0].n_latents)
