"""Cut a tower at a site: `suffix(*prefix(images))` equals the model, and no block runs twice.

No hook is set and no module is changed: the blocks before the site, the pieces of the block that
holds it and the blocks behind it are called one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from clipattr.clip.attention import Context, width_of_heads
from clipattr.clip.blocks import width_of_neurons
from clipattr.clip.site import STREAMS, TOKENS, Site
from clipattr.clip.trunk import NormLinear, Tokens, Trunk
from clipattr.errors import ConfigError

Inputs = Num[Tensor, "batch *shape"]  # images, or token ids of prompts
Activation = Float[Tensor, "batch *token width"]

# What a branch adds to, and the stream it makes.
ADDS = {
    "heads": ("residual_before", "residual_middle"),
    "attention": ("residual_before", "residual_middle"),
    "neurons": ("residual_middle", "residual"),
    "mlp": ("residual_middle", "residual"),
}


class Rest(NamedTuple):
    """What the suffix needs beside x; empty where x decides the embedding alone."""

    residual: Float[Tensor, "batch token model"] | None = None
    """the other tokens, and what the stream at the site is added to"""
    inputs: Int[Tensor, "batch position"] | None = None
    """token ids of the prompts: the mask and the pooled token follow from them"""

    def rows(self, index: Int[Tensor, " row"]) -> "Rest":
        """The rest of the images in `index`, for several edits of one image."""
        residual = None if self.residual is None else self.residual[index]
        return Rest(residual, None if self.inputs is None else self.inputs[index])


class State(NamedTuple):
    """A forward pass that stopped at a site."""

    x: Activation
    rest: Rest


class LastLayer(NamedTuple):
    """The weights between the last block's class token x and the embedding e.

    e = (gamma * (x - mean x) / sqrt(var x + eps) + beta) P + bias
    """

    gamma: Float[Tensor, " model"]
    beta: Float[Tensor, " model"]
    eps: float
    projection: Float[Tensor, "model embed"]
    bias: Float[Tensor, " embed"]


class Cut:
    """A tower in two halves: `prefix` runs up to the site, `suffix` from there on."""

    def __init__(self, trunk: Trunk, site: Site) -> None:
        _check_site(trunk, site)
        self.trunk = trunk
        self.site = Site(resolve_layer(trunk, site.layer), site.stream, site.tokens)
        self.block = trunk.blocks[self.site.layer]
        self.d_site = self._width()

    @property
    def is_whole(self) -> bool:
        """Whether x alone decides the embedding, so that the suffix needs no rest."""
        holds_state = self.site.stream not in ADDS and self._has_all_tokens
        return self._is_pooled or (holds_state and not self.trunk.reads_text)

    def read(self, inputs: Inputs) -> Activation:
        """From the input to x."""
        return capture(self.trunk, inputs, [self.site])[self.site]

    def prefix(self, inputs: Inputs) -> State:
        """From the input to x and what the suffix needs beside it."""
        layer, stream = self.site.layer, self.site.stream
        wanted = {stream}
        if stream in ADDS and not self._has_all_tokens:
            wanted.add(ADDS[stream][1])
        x = self.trunk.embed(inputs)
        contexts = self.trunk.contexts(inputs)
        for block, context in zip(self.trunk.blocks[:layer], contexts, strict=False):
            x = block.run(x, context)
        seen = _run_block(self.trunk, layer, x, contexts[layer], wanted, inputs)
        return State(self.take(seen[stream], inputs), self._rest(seen, inputs))

    def suffix(self, x: Activation, rest: Rest | None = None) -> Float[Tensor, "batch embed"]:
        """From x to the un-normalised embedding; differentiable in x and in the rest."""
        stream = self.site.stream
        if stream == "embedding":
            return x
        rest = rest or Rest()
        self._check(x, rest)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.trunk.dtype)
        match stream:
            case "heads":
                x = self.block.from_heads(x)
            case "neurons":
                x = self.block.from_neurons(x)
        if self._is_pooled:
            return self.trunk.head_of_cls(x)
        if stream in ADDS:
            assert rest.residual is not None, "checked above"
            x = self.take(rest.residual, rest.inputs) + x
        return self._finish(self._place(x, rest), rest.inputs)

    def _finish(self, x: Tokens, inputs: Tensor | None) -> Float[Tensor, "batch embed"]:
        """The rest of the block that holds the site, the blocks behind it, and the head."""
        layer, stream = self.site.layer, self.site.stream
        contexts = self.trunk.contexts(inputs)
        if stream == "residual_before":
            x = self.block.run(x, contexts[layer])
        elif stream in ("heads", "attention", "residual_middle"):
            x = x + self.block.run_mlp(x)
        for block, context in zip(
            self.trunk.blocks[layer + 1 :], contexts[layer + 1 :], strict=True
        ):
            x = block.run(x, context)
        return self.trunk.head(x, inputs)

    def last_layer(self, dtype: torch.dtype = torch.float32) -> LastLayer:
        """The suffix's weights, for closed forms; only where it is a norm and a linear layer."""
        found = self._norm_linear()
        if found is None:
            raise ConfigError(
                f"{self.site}: closed forms need the class token behind the last block of a tower "
                "whose head is a layer norm and a linear layer"
            )
        norm, projection, bias = found
        parts = (norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps)
        projection = projection.detach().to(dtype)
        bias = projection.new_zeros(projection.shape[1]) if bias is None else bias.detach()
        return LastLayer(*parts, projection, bias.to(dtype))

    @property
    def has_last_layer(self) -> bool:
        """Whether `last_layer` has an answer here."""
        return self._norm_linear() is not None

    def _norm_linear(self) -> NormLinear | None:
        if self.site.stream == "embedding" or not self._is_pooled:
            return None
        return self.trunk.norm_linear()

    def read_directly(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row embed"]:
        """Embeddings of vectors of the site's width as if they were the tower's output.

        Every block behind the site is left out: the logit lens of a direction. Of heads and neurons
        what their output projection makes of them, without its bias. It is computed in the
        precision of the tower, and given back in that of `x`.
        """
        if self.site.stream == "embedding":
            return x
        read = x.to(self.trunk.dtype)
        nothing = torch.zeros_like(read[:1])
        match self.site.stream:
            case "heads":
                read = self.block.from_heads(read) - self.block.from_heads(nothing)
            case "neurons":
                read = self.block.from_neurons(read) - self.block.from_neurons(nothing)
        if self.trunk.pools_cls:
            return self.trunk.head_of_cls(read).to(x.dtype)
        read = read[:, None].expand(-1, self.trunk.n_prefix + 1, -1)
        return self.trunk.head(read, None).to(x.dtype)

    def take(self, tokens: Tensor, inputs: Tensor | None) -> Activation:
        """The site's tokens out of all."""
        if self._has_all_tokens or self.site.stream == "embedding":
            return tokens
        if self.site.tokens == "spatial":
            return tokens[:, self.trunk.n_prefix :]
        return self.trunk.take_cls(tokens, inputs)

    def _place(self, x: Activation, rest: Rest) -> Tokens:
        """All tokens, those of the site replaced."""
        if self._has_all_tokens:
            return x
        assert rest.residual is not None, "checked by `suffix`"
        if self.site.tokens == "spatial":
            return torch.cat([rest.residual[:, : self.trunk.n_prefix], x], dim=1)
        return self.trunk.place_cls(x, rest.residual, rest.inputs)

    @property
    def _has_all_tokens(self) -> bool:
        is_bare = self.site.tokens == "spatial" and self.trunk.n_prefix == 0
        return self.site.tokens == "all" or is_bare

    @property
    def _is_pooled(self) -> bool:
        """Behind the site comes nothing but the head, on one token."""
        if self.site.stream == "embedding":
            return True
        is_last = self.site.layer == len(self.trunk.blocks) - 1 and self.site.stream == "residual"
        return is_last and self.site.tokens == "cls" and self.trunk.pools_cls

    def _rest(self, seen: dict[str, Tensor], inputs: Inputs) -> Rest:
        if self.is_whole:
            return Rest()
        stream = self.site.stream
        residual = None if self._has_all_tokens else seen[stream]
        if stream in ADDS:
            before, after = ADDS[stream]
            residual = seen[before]
            if not self._has_all_tokens:
                # The site's tokens still lack what the suffix adds; the others are finished.
                kept = self.take(residual, inputs)
                residual = self._place(kept, Rest(seen[after], inputs))
        return Rest(residual, inputs if self.trunk.reads_text else None)

    def _check(self, x: Activation, rest: Rest) -> None:
        n_axes = 2 if self.site.tokens == "cls" else 3
        if x.ndim != n_axes or x.shape[-1] != self.d_site:
            shape = "[rows, width]" if n_axes == 2 else "[rows, tokens, width]"
            raise ConfigError(
                f"{self.site}: x has the shape {list(x.shape)}; it must be {shape} with a width of "
                f"{self.d_site}"
            )
        if self.is_whole:
            return
        lacks_residual = rest.residual is None and not (
            self._has_all_tokens and self.site.stream not in ADDS
        )
        if lacks_residual or (rest.inputs is None and self.trunk.reads_text):
            raise ConfigError(
                f"{self.site}: the embedding depends on more than x; pass on the rest that prefix "
                "gives: x, rest = cut.prefix(inputs); cut.suffix(x, rest)"
            )
        for part in rest:
            if part is not None and len(part) != len(x):
                raise ConfigError(
                    f"x has {len(x)} rows and its rest {len(part)}: for several edits of one image "
                    "pass rest.rows(index)"
                )

    def _width(self) -> int:
        match self.site.stream:
            case "heads":
                return width_of_heads(self.block.attention)
            case "neurons":
                return width_of_neurons(self.block.mlp)
            case "embedding":
                return self.trunk.d_embed
            case _:
                return self.trunk.d_model


def capture(trunk: Trunk, inputs: Inputs, sites: Sequence[Site]) -> dict[Site, Activation]:
    """Activations at several sites in one pass, which ends at the last of them."""
    cuts = {site: Cut(trunk, site) for site in sites}
    wanted: dict[int, set[str]] = {}
    for cut in cuts.values():
        wanted.setdefault(cut.site.layer, set()).add(cut.site.stream)
    if not wanted:
        return {}
    last = max(wanted)
    found: dict[Site, Activation] = {}
    x, contexts = trunk.embed(inputs), trunk.contexts(inputs)
    for layer in range(last + 1):
        on_the_way = {"residual"} if layer < last else set()
        seen = _run_block(
            trunk, layer, x, contexts[layer], wanted.get(layer, set()) | on_the_way, inputs
        )
        for site, cut in cuts.items():
            if cut.site.layer == layer:
                found[site] = cut.take(seen[cut.site.stream], inputs)
        x = seen.get("residual", x)
    return found


def resolve_layer(trunk: Trunk, layer: int) -> int:
    """A layer counted from the front; ConfigError where there is none."""
    n_layers = len(trunk.blocks)
    if not -n_layers <= layer < n_layers:
        raise ConfigError(
            f"site.layer={layer}: the tower has {n_layers} layers, allowed are 0 to "
            f"{n_layers - 1} and -{n_layers} to -1"
        )
    return layer % n_layers


def _run_block(
    trunk: Trunk, layer: int, x: Tokens, context: Context, wanted: set[str], inputs: Inputs
) -> dict[str, Tensor]:
    """The wanted streams of a block; behind the last one lies the embedding."""
    if "embedding" not in wanted:
        return trunk.blocks[layer].streams(x, context, wanted)
    streams = trunk.blocks[layer].streams(x, context, wanted - {"embedding"} | {"residual"})
    return streams | {"embedding": trunk.head(streams["residual"], inputs)}


def _check_site(trunk: Trunk, site: Site) -> None:
    resolve_layer(trunk, site.layer)
    if site.stream not in STREAMS:
        raise ConfigError(f"site.stream={site.stream!r}: allowed are {', '.join(STREAMS)}")
    if site.tokens not in TOKENS:
        raise ConfigError(f"site.tokens={site.tokens!r}: allowed are {', '.join(TOKENS)}")
    if site.stream == "embedding":
        if site.layer not in (-1, len(trunk.blocks) - 1) or site.tokens != "cls":
            raise ConfigError(
                f"{site}: the embedding is one vector behind the last block: layer=-1, tokens=cls"
            )
    elif site.tokens == "cls" and not trunk.has_cls:
        raise ConfigError(
            f"{site}: the tower has no class token, allowed are spatial and all (or the stream "
            "embedding)"
        )
    elif site.tokens == "spatial" and trunk.reads_text:
        raise ConfigError(f"{site}: a text tower has no patches, allowed are cls (EOT) and all")
