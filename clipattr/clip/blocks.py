"""One transformer block taken apart, for the blocks of open_clip and timm.

    middle = x + attention(x),   residual = middle + mlp(middle)

Pre-norm blocks norm what a branch reads, post-norm blocks what it adds; layer scale belongs to what
it adds. Dropout is left out: towers are frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from jaxtyping import Float
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from clipattr.clip.attention import (
    Context,
    HeadMaps,
    attend,
    finish_heads,
    head_maps,
    mix_heads,
    project_heads,
    read_by_first,
)
from clipattr.errors import ConfigError

# Exact types: a subclass may compute something else.
KNOWN = (
    ResidualAttentionBlock,
    CustomResidualAttentionBlock,
    TimmBlock,
    ResPostBlock,
    EvaBlock,
    EvaBlockPostNorm,
)

Stream = Float[Tensor, "batch token _"]
Rows = Float[Tensor, "*rows _"]


@dataclass(frozen=True)
class Block:
    """The pieces of a block between which a tower can be cut."""

    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    before_attention: Callable[[Tensor], Tensor]
    after_attention: Callable[[Tensor], Tensor]
    before_mlp: Callable[[Tensor], Tensor]
    after_mlp: Callable[[Tensor], Tensor]
    is_post_norm: bool = False

    def run(self, x: Stream, context: Context) -> Stream:
        """The whole block, as the model calls it."""
        match self.module:
            case ResidualAttentionBlock() | CustomResidualAttentionBlock():
                return self.module(x, attn_mask=context.mask)
            case EvaBlock() | EvaBlockPostNorm():
                return self.module(x, rope=context.rope)
            case _:
                return self.module(x)

    def streams(self, x: Stream, context: Context, wanted: set[str]) -> dict[str, Stream]:
        """The wanted streams and what is computed on the way to them, no further."""
        found = {"residual_before": x}
        if wanted <= {"residual_before"}:
            return found
        if wanted <= {"residual_before", "residual"}:
            return found | {"residual": self.run(x, context)}
        if "heads" in wanted:
            found["heads"] = self.heads(x, context)
            if wanted <= found.keys():
                return found
            found["attention"] = self.from_heads(found["heads"])
        else:
            normed = self.before_attention(x)
            found["attention"] = self.after_attention(attend(self.attention, normed, context))
        found["residual_middle"] = middle = x + found["attention"]
        return found if wanted <= found.keys() else found | self._second_half(middle, wanted)

    def _second_half(self, middle: Stream, wanted: set[str]) -> dict[str, Stream]:
        if "neurons" not in wanted:
            mlp = self.run_mlp(middle)
            return {"mlp": mlp, "residual": middle + mlp}
        neurons = self.neurons(middle)
        if not wanted & {"mlp", "residual"}:
            return {"neurons": neurons}
        mlp = self.from_neurons(neurons)
        return {"neurons": neurons, "mlp": mlp, "residual": middle + mlp}

    def heads(self, x: Stream, context: Context) -> Stream:
        """Outputs of all heads side by side, before the output projection."""
        return mix_heads(self.attention, self.before_attention(x), context)

    def read_by_class(self, x: Stream, context: Context) -> Stream:
        """What the heads of the class token read from each token; see `finish_reading`."""
        return read_by_first(self.attention, self.before_attention(x), context)

    def finish_reading(self, total: Stream, x: Stream) -> Stream:
        """Outputs of the heads of tokens x, from the sum of what they read."""
        return finish_heads(self.attention, total, self.before_attention(x))

    def from_heads(self, z: Rows) -> Rows:
        """What attention adds to the residual stream, from the outputs of its heads."""
        return self.after_attention(project_heads(self.attention, z))

    def run_mlp(self, middle: Stream) -> Stream:
        """What the MLP adds to the residual stream."""
        return self.after_mlp(self.mlp(self.before_mlp(middle)))

    def neurons(self, middle: Stream) -> Stream:
        """Hidden activations of the MLP, after the non-linearity (and the gate of a GLU)."""
        return _neurons(self.mlp, self.before_mlp(middle))

    def from_neurons(self, neurons: Rows) -> Rows:
        """What the MLP adds to the residual stream, from its hidden activations."""
        return self.after_mlp(_from_neurons(self.mlp, neurons))

    def head_maps(self) -> HeadMaps:
        """Value-output maps, with the layer scale in the output; ConfigError where none exist."""
        if self.is_post_norm:
            raise ConfigError(
                "this tower norms what attention adds: heads have no linear value-output map"
            )
        value, value_bias, output, output_bias = head_maps(self.attention)
        scale = self.after_attention
        return HeadMaps(value, value_bias, scale(output), scale(output_bias))


def take_apart(block: nn.Module) -> Block | None:
    """The pieces of a known block; None for any other."""
    if type(block) not in KNOWN:
        return None
    match block:
        case ResidualAttentionBlock():
            parts = (block.ln_1, block.ls_1, block.ln_2, block.ls_2)
            return Block(block, block.attn, block.mlp, *parts)
        case CustomResidualAttentionBlock():
            after = nn.Sequential(block.ln_attn, block.ls_1)
            is_post_norm = not isinstance(block.ln_attn, nn.Identity)
            parts = (block.ln_1, after, block.ln_2, block.ls_2)
            return Block(block, block.attn, block.mlp, *parts, is_post_norm)
        case TimmBlock():
            parts = (block.norm1, block.ls1, block.norm2, block.ls2)
            return Block(block, block.attn, block.mlp, *parts)
        case EvaBlock():
            after = _Scale(block, "gamma_1"), _Scale(block, "gamma_2")
            parts = (block.norm1, after[0], block.norm2, after[1])
            return Block(block, block.attn, block.mlp, *parts)
        case ResPostBlock() | EvaBlockPostNorm():
            same = nn.Identity()
            parts = (same, block.norm1, same, block.norm2)
            return Block(block, block.attn, block.mlp, *parts, is_post_norm=True)
        case _:
            return None


@dataclass(frozen=True)
class _Scale:
    """Layer scale held as a parameter of the block, which may be absent."""

    block: nn.Module
    name: str

    def __call__(self, branch: Tensor) -> Tensor:
        gamma = getattr(self.block, self.name)
        return branch if gamma is None else gamma * branch


def width_of_neurons(mlp: nn.Module) -> int:
    """Number of hidden units; ConfigError for an MLP that is not known."""
    match mlp:
        case nn.Sequential():  # open_clip: c_fc, gelu, (ln,) c_proj
            return cast(nn.Linear, mlp.c_proj).in_features
        case Mlp() | GluMlp() | SwiGLU():
            return cast(nn.Linear, mlp.fc2).in_features
        case GeGluMlp():
            return mlp.w2.in_features
        case _:
            raise ConfigError(
                f"the MLP of this tower is a {type(mlp).__name__}, whose neurons are not read; the "
                "stream mlp is there"
            )


def _neurons(mlp: nn.Module, x: Tensor) -> Tensor:
    match mlp:
        case nn.Sequential():
            for layer in list(mlp)[:2]:
                x = layer(x)
            return x
        case GeGluMlp():
            normed = mlp.norm(x)
            return cast(nn.Module, mlp.act)(mlp.w0(normed)) * mlp.w1(normed)
        case SwiGLU():
            return mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)
        case GluMlp():
            act = cast(nn.Module, mlp.act)
            first, second = mlp.fc1(x).chunk(2, dim=-1)
            return first * act(second) if mlp.gate_last else act(first) * second
        case _:
            return mlp.act(mlp.fc1(x))  # type: ignore[operator]


def _from_neurons(mlp: nn.Module, neurons: Tensor) -> Tensor:
    match mlp:
        case nn.Sequential():
            for layer in list(mlp)[2:]:
                neurons = layer(neurons)
            return neurons
        case GeGluMlp():
            return mlp.w2(neurons)
        case _:
            return mlp.fc2(mlp.norm(neurons))  # type: ignore[operator]
