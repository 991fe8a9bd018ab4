"""Self-attention taken apart: weights, per-head outputs, value and output maps.

The layers of torch, open_clip and timm compute the same thing under other names:

    z_h = softmax(q_h k_h^T / sqrt(d_head) + mask) v_h,   out = [z_1 .. z_H] W_O + b_O

with rotary positions or norms on q and k, and in some towers a gate or a norm on z.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from open_clip.transformer import Attention as OpenClipAttention
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from clipattr.errors import ConfigError

# Exact types: a subclass may compute something else.
KNOWN = (nn.MultiheadAttention, OpenClipAttention, TimmAttention, AttentionRope, EvaAttention)
WITH_ROPE = (AttentionRope, EvaAttention)

Layer = Any  # one of KNOWN; their attributes are untyped


class Context(NamedTuple):
    """What a block reads beside the residual stream."""

    mask: Float[Tensor, "*rows query key"] | None = None
    """added to the attention logits"""
    rope: Tensor | None = None
    """rotary positions of the patches"""


class HeadMaps(NamedTuple):
    """The value-output circuit of every head of one block.

    With the block's normed input n and attention weights A_h, what attention adds is

        sum_h A_h (n V_h + value_bias_h) O_h + output_bias
    """

    value: Float[Tensor, "head model d_head"]
    value_bias: Float[Tensor, "head d_head"]
    output: Float[Tensor, "head d_head model"]
    output_bias: Float[Tensor, " model"]


def attend(
    layer: Layer, x: Float[Tensor, "batch token model"], context: Context
) -> Float[Tensor, "batch token model"]:
    """The layer as the model calls it."""
    if isinstance(layer, nn.MultiheadAttention):
        mask = context.mask
        return layer(x, x, x, need_weights=False, attn_mask=mask)[0]
    if isinstance(layer, OpenClipAttention):
        return layer(x, attn_mask=context.mask)
    return layer(x, rope=context.rope) if isinstance(layer, WITH_ROPE) else layer(x)


def n_heads(layer: Layer) -> int:
    """Number of heads; ConfigError for a layer that cannot be taken apart."""
    has_groups = getattr(layer, "num_kv_groups", 1) != 1
    has_cosine = isinstance(layer, OpenClipAttention) and layer.logit_scale is not None
    if type(layer) not in KNOWN or has_groups or has_cosine:
        raise ConfigError(
            f"the attention of this tower is a {type(layer).__name__} of a kind that is not read "
            "head by head; the streams residual_before, attention, residual_middle, mlp and "
            "residual do not need it"
        )
    return int(layer.num_heads)


def width_of_heads(layer: Layer) -> int:
    """Width of all heads side by side."""
    n_heads(layer)
    return _output_layer(layer).in_features


def mix_heads(
    layer: Layer, x: Float[Tensor, "batch token model"], context: Context
) -> Float[Tensor, "batch token heads"]:
    """Outputs z of all heads side by side: what the output projection reads."""
    q, k, v = _project(layer, x, context, "qkv")
    z = scaled_dot_product_attention(q, k, v, attn_mask=_mask_of(q, context))
    return finish_heads(layer, _side_by_side(layer, z), x)


def read_by_first(
    layer: Layer, x: Float[Tensor, "batch token model"], context: Context
) -> Float[Tensor, "batch token heads"]:
    """What the first token reads from every token: A_h(first, token) v_h(token), heads in a row.

    `finish_heads` of their sum over the tokens is the first token's row of `mix_heads`.
    """
    q, k, v = _project(layer, x, context, "qkv")
    first = q[:, :, :1] * q.shape[-1] ** -0.5
    weights = (first @ k.transpose(-2, -1)).softmax(dim=-1)
    return _side_by_side(layer, weights.transpose(-2, -1) * v)


def _side_by_side(layer: Layer, z: Tensor) -> Tensor:
    if (head_scale := getattr(layer, "head_scale", None)) is not None:
        z = z * head_scale
    return z.transpose(1, 2).flatten(2)


def finish_heads(
    layer: Layer, z: Float[Tensor, "batch token heads"], x: Float[Tensor, "batch token model"]
) -> Float[Tensor, "batch token heads"]:
    """The norm and the gate that some towers have behind the heads."""
    if isinstance(layer, OpenClipAttention):
        return layer.ln_inner(z)
    if isinstance(layer, nn.MultiheadAttention):
        return z
    z = layer.norm(z)
    gate = getattr(layer, "gate", None)
    return z if gate is None else z * gate(x).sigmoid()


def project_heads(layer: Layer, z: Float[Tensor, "*rows heads"]) -> Float[Tensor, "*rows model"]:
    """[z_1 .. z_H] W_O + b_O."""
    return _output_layer(layer)(z)


def attention_weights(
    layer: Layer, x: Float[Tensor, "batch token model"], context: Context
) -> Float[Tensor, "batch head query key"]:
    """Softmax of the attention logits."""
    q, k = _project(layer, x, context, "qk")
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mask = _mask_of(q, context)
    return (logits if mask is None else logits + mask).softmax(dim=-1)


def head_maps(layer: Layer) -> HeadMaps:
    """Value and output weights per head; ConfigError where a norm or gate stands between them."""
    heads = n_heads(layer)
    inner = getattr(layer, "norm", None) or getattr(layer, "ln_inner", None)
    if not isinstance(inner, nn.Identity | None) or getattr(layer, "gate", None) is not None:
        raise ConfigError(
            "this tower has a norm or a gate between the heads and their output projection: they "
            "have no linear value-output map"
        )
    weight, bias = _input_weights(layer)
    output = _output_layer(layer)
    d_model, width = weight.shape[1], output.in_features
    value = weight[-width:].reshape(heads, -1, d_model).transpose(1, 2)
    value_bias = weight.new_zeros(width) if bias is None else bias[-width:]
    rows = output.weight.T.reshape(heads, -1, output.out_features)
    if (head_scale := getattr(layer, "head_scale", None)) is not None:
        rows = rows * head_scale
    output_bias = rows.new_zeros(output.out_features) if output.bias is None else output.bias
    return HeadMaps(value, value_bias.reshape(heads, -1), rows, output_bias)


def _project(layer: Layer, x: Tensor, context: Context, wanted: str) -> tuple[Tensor, ...]:
    """Queries and keys (normed) and, where wanted, values: each [batch, head, token, d_head]."""
    heads = n_heads(layer)
    batch, token, _ = x.shape
    weight, bias = _input_weights(layer)
    n_rows = len(weight) * len(wanted) // 3
    bias = None if bias is None else bias[:n_rows]
    projected = linear(x, weight[:n_rows], bias).reshape(batch, token, len(wanted), heads, -1)
    q, k, *v = projected.permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(layer, nn.MultiheadAttention):
        return q, k, *v
    if isinstance(layer, OpenClipAttention):
        return layer.ln_q(q), layer.ln_k(k), *v
    q, k = layer.q_norm(q), layer.k_norm(k)
    if context.rope is not None:
        q, k = (_rotate(layer, side, context.rope).type_as(projected) for side in (q, k))
    return q, k, *v


def _rotate(layer: Layer, side: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions on the patches; class token and registers have none."""
    first, half = layer.num_prefix_tokens, getattr(layer, "rotate_half", False)
    patches = apply_rot_embed_cat(side[:, :, first:], rope, half=half)
    return torch.cat([side[:, :, :first], patches], dim=2)


def _mask_of(q: Tensor, context: Context) -> Tensor | None:
    mask = context.mask
    if mask is None or mask.ndim == 2:
        return mask
    return mask.reshape(q.shape[0], q.shape[1], *mask.shape[1:])


def _input_weights(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Rows of queries, keys and values, in this order."""
    if isinstance(layer, nn.MultiheadAttention | OpenClipAttention):
        weight, bias = layer.in_proj_weight, layer.in_proj_bias
    elif layer.qkv is None:
        parts = [layer.q_proj, layer.k_proj, layer.v_proj]
        weight = torch.cat([part.weight for part in parts])
        biases = [
            part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias
            for part in parts
        ]
        bias = torch.cat(biases)
    elif isinstance(layer, EvaAttention) and layer.q_bias is not None:
        assert layer.v_bias is not None, "queries and values have a bias, or neither"
        weight = layer.qkv.weight
        bias = torch.cat([layer.q_bias, cast(Tensor, layer.k_bias), layer.v_bias])
    else:
        weight, bias = layer.qkv.weight, layer.qkv.bias
    return weight, bias


def _output_layer(layer: Layer) -> nn.Linear:
    is_timm = not isinstance(layer, nn.MultiheadAttention | OpenClipAttention)
    output = layer.proj if is_timm else layer.out_proj
    assert isinstance(output, nn.Linear), "the output projection is linear in every known layer"
    return output
