"""The code of Dreyer et al. 2025, Attributing CLIP: a Lightning checkpoint of its TopK SAE."""

from torch import Tensor

from clipattr.sae.foreign.reading import Source, require_names, whole_number
from clipattr.sae.foreign.weights import fill, sizes
from clipattr.sae.imported import SignedTopKSae
from clipattr.sae.sae import Sae

ENCODER, DECODER, BIAS = "encoder.0", "decoder", "encoder.0.bias"
# Length and direction under weight_norm, in the words of the old and of the new one.
FORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def is_attributing_clip(tensors: dict[str, Tensor]) -> bool:
    """Whether an encoder of a state dict is under weight_norm."""
    return any(f"{ENCODER}.{length}" in tensors for length, _ in FORMS)


def read_attributing_clip(source: Source, tensors: dict[str, Tensor]) -> Sae:
    """TopK without a ReLU and without b_dec; k is in the name of their config alone."""
    path = source.path
    source.require_given(["k"], '{"k": 64}')
    length, direction = next(form for form in FORMS if f"{ENCODER}.{form[0]}" in tensors)
    encoder = f"{ENCODER}.{length}", f"{ENCODER}.{direction}"
    decoder = f"{DECODER}.{length}", f"{DECODER}.{direction}"
    require_names(path, tensors, {*encoder, *decoder, BIAS})
    # One length per latent: of a row of the encoder, and of a column of the decoder.
    W_enc = _normed(*(tensors[name] for name in encoder), dim=1)
    W_dec = _normed(*(tensors[name] for name in decoder), dim=0).T
    return fill(
        SignedTopKSae(**sizes(W_dec), k=whole_number(path, "k", source.given["k"])),
        W_enc=W_enc,
        b_enc=tensors[BIAS],
        W_dec=W_dec,
        b_dec=W_dec.new_zeros(W_dec.shape[1]),
        is_centred=False,
    )


def _normed(length: Tensor, direction: Tensor, dim: int) -> Tensor:
    return length * direction / direction.norm(dim=dim, keepdim=True)
