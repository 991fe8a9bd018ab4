"""The image and the text tower of a CLIP model."""

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from clipattr.clip.attention import HeadMaps, attention_weights
from clipattr.clip.blocks import Block
from clipattr.clip.cut import Activation, Cut, Inputs, capture, resolve_layer
from clipattr.clip.images import ImageTrunk, image_trunk
from clipattr.clip.site import Site
from clipattr.clip.texts import text_trunk
from clipattr.clip.trunk import Tokens, Trunk
from clipattr.errors import ConfigError


class Tower:
    """A tower as a whole: embed, cut, read several sites at once, look at its heads."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.n_layers = len(trunk.blocks)
        self.d_model = trunk.d_model
        self.n_prefix = trunk.n_prefix
        self.has_cls = trunk.has_cls

    def embed(self, inputs: Inputs) -> Float[Tensor, "batch embed"]:
        """The un-normalised embedding; of prompts no further than the longest one is read."""
        return Cut(self.trunk, Site(-1, "embedding")).read(self.trunk.trim(inputs))

    def cut(self, site: Site) -> Cut:
        """The tower in two halves; ConfigError for a site that it does not have."""
        return Cut(self.trunk, site)

    def capture(self, inputs: Inputs, sites: Sequence[Site]) -> dict[Site, Activation]:
        """Activations at several sites in one pass, which ends at the last of them."""
        return capture(self.trunk, inputs, sites)

    def count_tokens(self, tokens: str) -> int:
        """How many an image has of `cls`, `spatial` or `all`."""
        assert isinstance(self.trunk, ImageTrunk), "prompts have as many as they have words"
        if tokens == "cls":
            return 1
        n_patches = self.trunk.count_patches()
        return n_patches if tokens == "spatial" else n_patches + self.n_prefix

    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, which follow each other row by row."""
        assert isinstance(self.trunk, ImageTrunk), "prompts have no patches"
        height, width = self.trunk.image_size
        n_patches = self.trunk.count_patches()
        rows = max(1, round(math.sqrt(n_patches * height / width)))
        if n_patches % rows:
            raise ConfigError(
                f"{n_patches} patches of images of {height} x {width} pixels are no grid of squares"
            )
        return rows, n_patches // rows

    def attention_weights(
        self,
        layer: int,
        before: Tokens,
        inputs: Int[Tensor, "batch position"] | None = None,
    ) -> Float[Tensor, "batch head query key"]:
        """How much every token reads from every other, per head.

        Args:
            layer: of the block; negative counts from the end.
            before: x at Site(layer, "residual_before", "all").
            inputs: token ids, in a text tower.
        """
        block = self._block(layer)
        context = self.trunk.contexts(inputs)[layer]
        return attention_weights(block.attention, block.before_attention(before), context)

    def head_maps(self, layer: int) -> HeadMaps:
        """The value-output maps of a block, on its normed input; see `HeadMaps`."""
        return self._block(layer).head_maps()

    def normed_input(self, layer: int, before: Tokens) -> Tokens:
        """What the heads of a block read: its input, behind the norm where that comes first."""
        return self._block(layer).before_attention(before)

    def _block(self, layer: int) -> Block:
        return self.trunk.blocks[resolve_layer(self.trunk, layer)]


def image_tower(model: nn.Module) -> Tower:
    """The image tower of an open_clip model; ConfigError for one that cannot be cut."""
    _check_eval(model)
    return Tower(image_trunk(model))


def text_tower(model: nn.Module) -> Tower:
    """The text tower of an open_clip model; ConfigError for one that cannot be cut."""
    _check_eval(model)
    return Tower(text_trunk(model))


def _check_eval(model: nn.Module) -> None:
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() before cutting it")
