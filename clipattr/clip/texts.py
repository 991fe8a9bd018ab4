"""The text towers that can be cut: open_clip's own text transformer."""

from typing import Any

import torch
from jaxtyping import Int
from open_clip import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipattr.clip.attention import Context
from clipattr.clip.blocks import Block
from clipattr.clip.trunk import NormLinear, Tokens, Trunk, take_all_apart
from clipattr.errors import ConfigError

TokenIds = Int[Tensor, "batch position"]


class Texts(Trunk):
    """open_clip's text transformer, packed into the model (CLIP) or a module of its own."""

    reads_text = True
    n_prefix = 0
    has_cls = True
    pools_cls = True

    def __init__(self, part: CLIP | TextTransformer, blocks: list[Block]) -> None:
        self.part: Any = part  # untyped in open_clip
        self.blocks = blocks
        self.d_model = part.transformer.width
        is_packed = isinstance(part, CLIP)
        self.pool_type = part.text_pool_type if is_packed else part.pool_type
        self.eos_id: int = self.part.text_eos_id if is_packed else self.part.eos_id
        self.cls_embedding: Tensor | None = None if is_packed else part.cls_emb
        self.has_padding_mask = not is_packed and (
            part.use_pad_mask or self.cls_embedding is not None
        )
        match self.part.text_projection:
            case None:
                self.d_embed = self.d_model
            case nn.Linear() as linear:
                self.d_embed = linear.out_features
            case projection:
                self.d_embed = projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the linear layers."""
        return self.part.transformer.get_cast_dtype()

    def trim(self, inputs: TokenIds) -> Int[Tensor, "batch _"]:
        """Token ids without the padding that no pooled token of the batch can see.

        Under a causal mask a token sees those in front of it only, so the columns behind the last
        EOT change nothing: a short prompt costs a fraction of the full context.
        """
        ends_at_eot = self.pool_type in ("argmax", "eos") and self.cls_embedding is None
        if self.part.attn_mask is None or not ends_at_eot:
            return inputs
        return inputs[:, : int(self._pooled_position(inputs).max()) + 1]

    def embed(self, inputs: TokenIds) -> Tokens:
        """Words with their positions; CoCa appends a class token."""
        x = self.part.token_embedding(inputs).to(self.dtype)
        if self.cls_embedding is not None:
            x = torch.cat([x, self.cls_embedding.expand(len(x), 1, -1)], dim=1)
        return x + self.part.positional_embedding[: x.shape[1]].to(self.dtype)

    def contexts(self, inputs: Tensor | None) -> list[Context]:
        """The causal mask, the mask of the padding, both or neither."""
        assert inputs is not None, "the mask of a text tower follows from its token ids"
        length = inputs.shape[1] + (self.cls_embedding is not None)
        mask = self.part.attn_mask
        mask = None if mask is None else mask[:length, :length].to(self.dtype)
        if self.has_padding_mask:
            assert isinstance(self.part, TextTransformer)
            padding = self.part._build_additive_mask(inputs, length, self.dtype)
            mask = padding if mask is None else mask + padding
        return [Context(mask=mask)] * len(self.blocks)

    def head(self, x: Tokens, inputs: Tensor | None) -> Tensor:
        """Pooled first: the final norm is token by token, so most of it would be thrown away."""
        return self.head_of_cls(self.take_cls(x, inputs))

    def head_of_cls(self, x: Tensor) -> Tensor:
        """Final norm and projection."""
        pooled = self.part.ln_final(x)
        match self.part.text_projection:
            case None:
                return pooled
            case nn.Linear() as linear:
                return linear(pooled)
            case projection:
                return pooled @ projection

    def take_cls(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        """The pooled token, which stands elsewhere in every text."""
        return x[torch.arange(len(x), device=x.device), self._position(x, inputs)]

    def place_cls(self, cls: Tensor, x: Tensor, inputs: Tensor | None) -> Tensor:
        """All tokens with another pooled token."""
        tokens = torch.arange(x.shape[1], device=x.device)
        is_cls = tokens == self._position(x, inputs)[:, None]
        return torch.where(is_cls[..., None], cls[:, None], x)

    def _position(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        assert inputs is not None, "the pooled token of a text follows from its token ids"
        return self._pooled_position(inputs).expand(len(x))

    def _pooled_position(self, inputs: TokenIds) -> Int[Tensor, " batch"]:
        """Where the token stands that becomes the embedding."""
        length = inputs.shape[1] + (self.cls_embedding is not None)
        if self.cls_embedding is not None or self.pool_type == "last":
            return inputs.new_full(inputs.shape[:1], length - 1)
        match self.pool_type:
            case "first":
                return inputs.new_zeros(inputs.shape[:1])
            case "argmax":
                return inputs.argmax(dim=1)
            case _:
                return inputs.eq(self.eos_id).int().argmax(dim=1)

    def norm_linear(self) -> NormLinear | None:
        """ln_final and text_projection."""
        norm, projection = self.part.ln_final, self.part.text_projection
        match projection:
            case nn.Linear():
                return NormLinear(norm, projection.weight.T, projection.bias)
            case Tensor():
                return NormLinear(norm, projection, None)
            case _:
                return None


def find_text_trunk(model: nn.Module) -> Trunk | None:
    """The text tower of an open_clip model, where it can be cut."""
    part = model if isinstance(model, CLIP) else getattr(model, "text", None)
    if not isinstance(part, CLIP | TextTransformer) or not part.transformer.batch_first:
        return None
    blocks = take_all_apart(part.transformer.resblocks)
    trunk = Texts(part, blocks)
    return trunk if blocks and trunk.pool_type != "none" else None


def text_trunk(model: nn.Module) -> Trunk:
    """The text tower of an open_clip model; ConfigError where it cannot be cut."""
    trunk = find_text_trunk(model)
    if trunk is None:
        raise ConfigError(
            f"the text tower is a {type(getattr(model, 'text', model)).__name__}, which has no "
            "sites: it embeds prompts (clip.encode_text). Sites exist in open_clip's own text "
            "transformer"
        )
    return trunk
