"""Oracles: raw hooks on the modules of open_clip and timm that read and patch every stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

# In the order in which a block computes them.
STREAMS = (
    "residual_before",
    "heads",
    "attention",
    "residual_middle",
    "neurons",
    "mlp",
    "residual",
)

Edit = Callable[[Tensor], Tensor]
Encode = Callable[[Tensor], Tensor]


class Points(NamedTuple):
    """The modules of a block at which a hook sees a stream."""

    heads: nn.Module  # its input; nn.MultiheadAttention calls no projection: see `_patch_inside`
    attention: nn.Module  # its output
    middle: nn.Module  # its input
    neurons: nn.Module  # its output
    mlp: nn.Module  # its output


def points_of(block: nn.Module) -> Points:
    module: Any = block
    mlp, attention = module.mlp, module.attn
    match block:
        case ResidualAttentionBlock():
            return Points(attention, module.ls_1, module.ln_2, mlp.gelu, module.ls_2)
        case CustomResidualAttentionBlock():
            return Points(attention.out_proj, module.ls_1, module.ln_2, mlp.gelu, module.ls_2)
        case EvaBlockPostNorm() | ResPostBlock():
            branches = module.drop_path1, module.drop_path2
            return Points(attention.proj, branches[0], mlp, mlp.drop1, branches[1])
        case EvaBlock() | Block():
            branches = module.drop_path1, module.drop_path2
            return Points(attention.proj, branches[0], module.norm2, mlp.drop1, branches[1])
    raise TypeError(f"no points for {type(block).__name__}")


def loop_over_heads(
    attention: nn.MultiheadAttention, x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention as in the paper, one head at a time: outputs [batch, query, width] and weights."""
    n_heads, d_head = attention.num_heads, attention.head_dim
    assert attention.in_proj_weight is not None
    matrices = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    outputs, all_weights = [], []
    for head in range(n_heads):
        rows = slice(head * d_head, (head + 1) * d_head)
        q, k, v = (
            x @ matrix[rows].T + bias[rows] for matrix, bias in zip(matrices, biases, strict=True)
        )
        logits = q @ k.transpose(1, 2) / d_head**0.5
        if mask is not None:
            logits = logits + (mask if mask.ndim == 2 else mask[head::n_heads])
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs.append(weights @ v)
        all_weights.append(weights)
    return torch.cat(outputs, dim=-1), torch.stack(all_weights, dim=1)


@contextmanager
def patched(block: nn.Module, stream: str, edit: Edit) -> Iterator[None]:
    """While open, the block runs with `edit(activation)` in place of the activation."""
    points = points_of(block)
    with ExitStack() as stack:
        match stream:
            case "residual_before":
                handles = [_edit_input(block, edit)]
            case "residual_middle":
                handles = _patch_middle(block, points, edit)
            case "residual":
                handles = [_edit_output(block, edit)]
            case "heads" if isinstance(points.heads, nn.MultiheadAttention):
                handles = [_patch_inside(points.heads, edit)]
            case "heads":
                handles = [_edit_input(points.heads, edit)]
            case _:
                handles = [_edit_output(getattr(points, stream), edit)]
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _edit_input(module: nn.Module, edit: Edit) -> Any:
    return module.register_forward_pre_hook(lambda _module, args: (edit(args[0]), *args[1:]))


def _edit_output(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return edit(output)

    return module.register_forward_hook(hook)


def _patch_middle(block: nn.Module, points: Points, edit: Edit) -> list[Any]:
    """No module outputs the sum: the attention branch adds what is missing to the edited one."""
    before: list[Tensor] = []
    return [
        _edit_input(block, lambda x: before.append(x) or x),
        _edit_output(points.attention, lambda out: edit(before[-1] + out) - before[-1]),
    ]


def _patch_inside(attention: nn.MultiheadAttention, edit: Edit) -> Any:
    """Head outputs are a local variable of torch: computed by the loop, projected by hand."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        heads, _ = loop_over_heads(attention, args[0], kwargs.get("attn_mask"))
        weight, bias = attention.out_proj.weight, attention.out_proj.bias
        torch.testing.assert_close(heads @ weight.T + bias, output[0], atol=1e-4, rtol=1e-4)
        return edit(heads) @ weight.T + bias, None

    return attention.register_forward_hook(hook, with_kwargs=True)


class Recording(NamedTuple):
    """One pass of the whole model, with the graph from the first block on."""

    embedding: Tensor
    activations: Mapping[tuple[int, str], Tensor]

    def gradients(self, direction: Tensor) -> Mapping[tuple[int, str], Tensor]:
        """Of the embedding along `direction`, by autograd through the whole model."""
        score = (self.embedding * direction).sum()
        values = torch.autograd.grad(
            score, list(self.activations.values()), retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.activations, values, strict=True))


def record(encode: Encode, blocks: Sequence[nn.Module], inputs: Tensor) -> Recording:
    """Every stream of every block, as the hooks see it."""
    seen: dict[tuple[int, str], Tensor] = {}

    def store(layer: int, stream: str) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            if (layer, stream) == (0, "residual_before"):
                activation = activation.detach().requires_grad_()
            seen[layer, stream] = activation
            return activation

        return edit

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            for stream in STREAMS:
                edit = store(layer, stream)
                if stream == "residual_middle":
                    stack.callback(_edit_input(points_of(block).middle, edit).remove)
                else:
                    stack.enter_context(patched(block, stream, edit))
        with torch.enable_grad():
            embedding = encode(inputs)
    return Recording(embedding, seen)


def fused_weights(encode: Encode, blocks: Sequence[nn.Module], inputs: Tensor) -> dict[int, Tensor]:
    """Attention weights by the library itself: torch's own, or timm's unfused path."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.enter_context(_weights_of(block.attn, seen, layer))
        encode(inputs)
    return seen


@contextmanager
def _weights_of(attention: Any, seen: dict[int, Tensor], layer: int) -> Iterator[None]:
    if isinstance(attention, nn.MultiheadAttention):

        def hook(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            wanted = kwargs | {"need_weights": True, "average_attn_weights": False}
            seen[layer] = nn.MultiheadAttention.forward(module, *args, **wanted)[1]  # type: ignore[arg-type]

        handle: Any = attention.register_forward_hook(hook, with_kwargs=True)
        yield
    else:
        fused, attention.fused_attn = attention.fused_attn, False
        handle = attention.attn_drop.register_forward_hook(
            lambda _module, _args, output: seen.__setitem__(layer, output)
        )
        yield
        attention.fused_attn = fused
    handle.remove()
