"""Names the place in a tower where we read and patch."""

from dataclasses import asdict, dataclass

STREAMS = {
    "residual_before": "the residual stream before the block",
    "heads": "outputs of all attention heads, side by side, before the output projection",
    "attention": "what attention adds to the residual stream",
    "residual_middle": "the residual stream between attention and MLP",
    "neurons": "hidden activations of the MLP, after the non-linearity",
    "mlp": "what the MLP adds to the residual stream",
    "residual": "the residual stream after the block",
    "embedding": "the un-normalised embedding, behind the last block",
}
"""Every stream, in the order in which a block computes them."""

TOKENS = {
    "cls": "the class token; in a text tower the token that becomes the embedding (EOT)",
    "spatial": "all patches",
    "all": "every token",
}


@dataclass(frozen=True)
class Site:
    """A layer (negative counts from the end), a stream and the tokens that are read there."""

    layer: int = -1
    stream: str = "residual"
    tokens: str = "cls"

    def to_json(self) -> dict[str, str | int]:
        """Plain fields, as files record them."""
        return asdict(self)
