"""Cut open_clip's image tower at a site: `suffix(prefix(images))` equals the model.

This version cuts at the class token after the last block, where the suffix is a layer norm and a
projection. An earlier site is refused, not approximated.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clipattr.clip.site import Site
from clipattr.errors import ConfigError


class LastLayer(NamedTuple):
    """The weights between the last block's class token x and the embedding e.

    e = (gamma * (x - mean x) / sqrt(var x + eps) + beta) P
    """

    gamma: Float[Tensor, " model"]
    beta: Float[Tensor, " model"]
    eps: float
    projection: Float[Tensor, "model embed"]


class Tower:
    """The image tower of a CLIP model, cut at a site."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        visual = model.visual
        if not isinstance(visual, VisionTransformer):
            raise ConfigError(
                f"the image tower is a {type(visual).__name__}; sites exist in open_clip's "
                "VisionTransformer only"
            )
        if visual.attn_pool is not None or visual.pool_type != "tok" or visual.proj is None:
            raise ConfigError(
                f"the image tower pools with {visual.pool_type!r}; this version needs the class "
                "token followed by a projection"
            )
        assert isinstance(visual.ln_post, nn.LayerNorm), "open_clip norms are LayerNorms"
        self.visual = visual
        self.norm: nn.LayerNorm = visual.ln_post
        self.projection: Tensor = visual.proj
        self.n_layers = len(visual.transformer.resblocks)
        self.site = Site(self._layer_of(site), site.stream, site.tokens)

    def _layer_of(self, site: Site) -> int:
        layer = site.layer + self.n_layers if site.layer < 0 else site.layer
        if layer != self.n_layers - 1:
            raise ConfigError(
                f"site.layer={site.layer} of a tower with {self.n_layers} layers: this version "
                f"cuts after the last block only (-1 or {self.n_layers - 1})"
            )
        if (site.stream, site.tokens) != ("residual", "cls"):
            raise ConfigError(
                f"site.stream={site.stream!r}, site.tokens={site.tokens!r}: this version reads "
                "the residual stream of the cls token only"
            )
        return layer

    @property
    def d_model(self) -> int:
        """Width of the activation at the site."""
        return self.visual.transformer.width

    def prefix(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch model"]:
        """From images to the activation x at the site."""
        return self.visual.transformer(self.visual._embeds(images))[:, 0]

    def suffix(self, x: Float[Tensor, "rows model"]) -> Float[Tensor, "rows embed"]:
        """From x to the un-normalised embedding e."""
        return self.norm(x) @ self.projection

    def last_layer(self, dtype: torch.dtype = torch.float32) -> LastLayer:
        """The suffix's weights, for closed forms."""
        return LastLayer(
            self.norm.weight.detach().to(dtype),
            self.norm.bias.detach().to(dtype),
            self.norm.eps,
            self.projection.detach().to(dtype),
        )
