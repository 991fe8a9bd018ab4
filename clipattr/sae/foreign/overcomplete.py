"""overcomplete: the state dict of an SAE whose encoder is linear, or tied to its dictionary."""

from collections.abc import Callable

import torch
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae.foreign.reading import Source, require_names, whole_number
from clipattr.sae.foreign.weights import fill, jump_relu, relu, topk
from clipattr.sae.sae import Sae

WEIGHTS, MULTIPLIER = "dictionary._weights", "dictionary.multiplier"
LINEAR, NORM = "encoder.final_block.0", "encoder.final_block.1"
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
TIED = "encoder.tied_to."
# What torch and overcomplete add to a variance and to a norm.
BATCH_NORM_EPSILON, NORM_EPSILON = 1e-5, 1e-8

NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda rows: rows / (rows.norm(dim=1, keepdim=True) + NORM_EPSILON),
    "max_l2": lambda rows: rows / rows.norm(dim=1).amax(),
    "l1": lambda rows: rows / (rows.abs().sum(1, keepdim=True) + NORM_EPSILON),
    "max_l1": lambda rows: rows / rows.abs().sum(1).amax(),
    "identity": lambda rows: rows,
}
OWN_SETTINGS = {
    "SAE": {},
    "TopKSAE": {"top_k": 32},
    "BatchTopKSAE": {"running_threshold": 0.5},
    "JumpSAE": {},
}


def is_overcomplete(tensors: dict[str, Tensor]) -> bool:
    """Whether a state dict has a dictionary layer."""
    return any(name.startswith("dictionary.") for name in tensors)


def read_overcomplete(source: Source, tensors: dict[str, Tensor]) -> Sae:
    """SAE (ReLU), TopKSAE, BatchTopKSAE and JumpSAE; which of them the state dict does not say."""
    path, kind = source.path, source.given.get("class", "TopKSAE")
    if kind not in OWN_SETTINGS:
        raise CheckpointError(f"{path}: class is {kind!r}; known are {', '.join(OWN_SETTINGS)}")
    example = {"class": kind, "normalization": "l2", **OWN_SETTINGS[kind]}
    source.require_given(example, str(example))
    jump = {"thresholds"} if kind == "JumpSAE" else set()
    encoder = {name for name in tensors if name.startswith("encoder.")}
    require_names(path, tensors, {WEIGHTS, MULTIPLIER, *jump}, encoder)
    W_dec = _dictionary(source, tensors)
    W_enc, b_enc = _encoder(source, {name: tensors[name] for name in encoder}, W_dec)
    rest: dict[str, Tensor] = {}
    match kind:
        case "TopKSAE":
            sae = topk(W_dec, whole_number(path, "top_k", source.given["top_k"]))
        case "SAE":
            sae = relu(W_dec)
        case "JumpSAE":
            sae, rest = jump_relu(W_dec), {"threshold": tensors["thresholds"].exp()}
        case _:
            # Its top_k is of a whole batch, of whatever size: what it does in use is a JumpReLU.
            sae = jump_relu(W_dec)
            rest = {"threshold": torch.full_like(b_enc, source.given["running_threshold"])}
    b_dec = W_dec.new_zeros(W_dec.shape[1])
    return fill(sae, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, is_centred=False, **rest)


def _dictionary(source: Source, tensors: dict[str, Tensor]) -> Tensor:
    name = source.given["normalization"]
    if name not in NORMALISATIONS:
        raise CheckpointError(
            f"{source.path}: normalization is {name!r}; known are {', '.join(NORMALISATIONS)}"
        )
    return NORMALISATIONS[name](tensors[WEIGHTS]) * tensors[MULTIPLIER].exp()


def _encoder(
    source: Source, tensors: dict[str, Tensor], dictionary: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights and biases of an encoder that is linear in use."""
    path, no_bias = source.path, dictionary.new_zeros(len(dictionary))
    if f"{LINEAR}.weight" not in tensors:  # a TieableEncoder
        tied = {name for name in tensors if name.startswith(TIED)}
        weight = set() if tied else {"encoder.weight"}
        require_names(path, tensors, weight, {"encoder.bias", *tied})
        rows = dictionary if tied else tensors["encoder.weight"]
        return rows, tensors.get("encoder.bias", no_bias)
    W_enc, b_enc = tensors[f"{LINEAR}.weight"], tensors[f"{LINEAR}.bias"]
    linear, norm = {f"{LINEAR}.weight", f"{LINEAR}.bias"}, {f"{NORM}.{n}" for n in BATCH_NORM}
    if tensors.keys() == linear:
        return W_enc, b_enc
    require_names(path, tensors, linear | norm)
    scale, bias, mean, variance = (tensors[f"{NORM}.{name}"] for name in BATCH_NORM[:4])
    scale = scale / (variance + BATCH_NORM_EPSILON).sqrt()
    return W_enc * scale[:, None], (b_enc - mean) * scale + bias
