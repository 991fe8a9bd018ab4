"""The image towers that can be cut: the transformers of open_clip and timm."""

from typing import cast

import torch
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clipattr.clip.attention import Context
from clipattr.clip.blocks import Block
from clipattr.clip.trunk import NormLinear, Tokens, Trunk, take_all_apart
from clipattr.errors import ConfigError

Images = Float[Tensor, "batch channel height width"]


class ImageTrunk(Trunk):
    """What image towers share: a fixed size of pictures."""

    reads_text = False

    def __init__(self, visual: nn.Module, blocks: list[Block]) -> None:
        self.visual = visual
        self.blocks = blocks
        first = next(m for m in visual.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        self._first = first.weight
        height, width = visual.image_size  # type: ignore[misc]
        self.image_size = (int(height), int(width))  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """That of the patch embedding: parameters outside of layers may stay in float32."""
        return self._first.dtype

    @torch.no_grad()
    def count_patches(self) -> int:
        """Tokens behind the prefix: stems and padding of many kinds decide it, so one is made."""
        blank = torch.zeros(1, 3, *self.image_size, device=self._first.device)
        return self.embed(blank).shape[1] - self.n_prefix

    def _checked(self, images: Images) -> Images:
        if images.shape[-2:] != self.image_size:
            raise ConfigError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels; the tower takes "
                f"{self.image_size[0]} x {self.image_size[1]}: use the model's own preprocessing"
            )
        return images.to(self.dtype)


class OpenClipImages(ImageTrunk):
    """open_clip's VisionTransformer, with class-token, average or attention pooling."""

    n_prefix = 1
    has_cls = True

    def __init__(self, visual: VisionTransformer, blocks: list[Block]) -> None:
        super().__init__(visual, blocks)
        self.vit = visual
        self.d_model = visual.transformer.width
        self.d_embed = visual.output_dim
        self.pools_cls = visual.attn_pool is None and visual.pool_type == "tok"

    def embed(self, inputs: Images) -> Tokens:
        """Class token and patches with their positions, normed where the model has a pre-norm."""
        return self.vit._embeds(self._checked(inputs))

    def contexts(self, inputs: Tensor | None) -> list[Context]:
        """Nothing."""
        return [Context()] * len(self.blocks)

    def head(self, x: Tokens, inputs: Tensor | None) -> Tensor:
        """Norm and pooling in the model's order, then the projection."""
        pooled, _ = self.vit._pool(x)
        return pooled if self.vit.proj is None else pooled @ self.vit.proj

    def norm_linear(self) -> NormLinear | None:
        """ln_post and proj, where the class token is pooled."""
        norm, projection = self.vit.ln_post, self.vit.proj
        if not self.pools_cls or not isinstance(norm, nn.LayerNorm) or projection is None:
            return None
        return NormLinear(norm, projection, None)


class TimmImages(ImageTrunk):
    """timm's VisionTransformer and Eva inside open_clip: SigLIP, EVA, PE, MobileCLIP-B, ViTamin."""

    def __init__(
        self, visual: TimmModel, vit: TimmVisionTransformer | Eva, blocks: list[Block]
    ) -> None:
        super().__init__(visual, blocks)
        self.vit = vit
        self.adapter = visual.head
        self.d_model = vit.embed_dim
        linear = [
            m for m in (*vit.head.modules(), *visual.head.modules()) if isinstance(m, nn.Linear)
        ]
        self.d_embed = linear[-1].out_features if linear else vit.embed_dim
        self.n_prefix = vit.num_prefix_tokens
        self.has_cls = vit.cls_token is not None
        self.pools_cls = vit.attn_pool is None and vit.global_pool == "token"

    def embed(self, inputs: Images) -> Tokens:
        """Prefix tokens and patches with their positions, normed where the model has a pre-norm."""
        patches = self.vit.patch_embed(self._checked(inputs))
        if isinstance(self.vit, Eva):
            x, _ = self.vit._pos_embed(patches)
        else:
            x = self.vit.patch_drop(self.vit._pos_embed(patches))
        return self.vit.norm_pre(x)

    def contexts(self, inputs: Tensor | None) -> list[Context]:
        """Rotary positions, one for all blocks or one for each."""
        rope = self._rope()
        if rope is None:
            return [Context()] * len(self.blocks)
        is_per_layer = getattr(self.vit, "rope_mixed", False)
        layers = range(len(self.blocks))
        return [Context(rope=rope[layer] if is_per_layer else rope) for layer in layers]

    def _rope(self) -> Tensor | None:
        """The same for all images of the tower's size."""
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return None
        is_fixed = not self.vit.dynamic_img_size and hasattr(rope, "feat_shape")
        return rope.get_embed() if is_fixed else rope.get_embed(self.vit.patch_embed.grid_size)

    def head(self, x: Tokens, inputs: Tensor | None) -> Tensor:
        """The trunk's norm, pooling and head, then open_clip's own layers on top."""
        return self.adapter(self.vit.forward_head(self.vit.norm(x)))

    def norm_linear(self) -> NormLinear | None:
        """Norm and the only linear layer behind it, where the class token is pooled."""
        parts = [self.vit.norm, self.vit.fc_norm, self.vit.head, *self.adapter]
        parts = [part for part in parts if not isinstance(part, nn.Identity | nn.Dropout)]
        match parts:
            case [nn.LayerNorm() as norm, nn.Linear() as linear] if self.pools_cls:
                return NormLinear(norm, linear.weight.T, linear.bias)
            case _:
                return None


def image_trunk(model: nn.Module) -> Trunk:
    """The image tower of an open_clip model; ConfigError where it cannot be cut."""
    visual = model.visual
    found = type(visual).__name__
    if type(visual) is VisionTransformer:
        blocks = take_all_apart(visual.transformer.resblocks)
        if blocks and visual.transformer.batch_first and visual.pool_type != "none":
            return OpenClipImages(visual, blocks)
        found += f" with pool_type={visual.pool_type!r}"
    elif type(visual) is TimmModel:
        vit = cast(TimmVisionTransformer | Eva, visual.trunk)
        if type(vit) in (TimmVisionTransformer, Eva) and (blocks := take_all_apart(vit.blocks)):
            return TimmImages(visual, vit, blocks)
        found = f"timm {type(vit).__name__}"
    raise ConfigError(
        f"the image tower is a {found}, which has no sites: it embeds images (clip.encode_image, "
        "zero-shot, probes on the embedding). Sites exist in open_clip's VisionTransformer and in "
        "timm's VisionTransformer and Eva"
    )
