"""ViT-Prisma: a .pt file with the state dict, and config.json beside it, as on its hub."""

from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae.foreign.reading import Source, expect, require_names, whole_number
from clipattr.sae.foreign.weights import fill, gated, relu, topk
from clipattr.sae.sae import Sae

SETTINGS = "config.json"
NORMALISATIONS = ("none", "layer_norm")
WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
GATE = {"b_gate", "r_mag", "b_mag"}


def is_prisma(source: Source, tensors: dict[str, Tensor]) -> bool:
    """Whether there are the weights and the settings of one."""
    return tensors.keys() >= WEIGHTS and (
        "architecture" in source.given or source.path.with_name(SETTINGS).is_file()
    )


def read_prisma(source: Source, tensors: dict[str, Tensor]) -> Sae:
    """Standard (ReLU or TopK) and gated, the input as it is or of layer norm."""
    path = source.path
    is_alone = "architecture" in source.given and not path.with_name(SETTINGS).is_file()
    settings = source.given if is_alone else source.settings_of(SETTINGS)
    expect(path, settings, is_transcoder=False)
    normalised = settings["normalize_activations"]
    if normalised not in NORMALISATIONS:
        raise CheckpointError(
            f"{path}: normalize_activations is {normalised!r}; imported can be "
            f"{' or '.join(NORMALISATIONS)}"
        )
    W_dec, is_row_scaled = tensors["W_dec"], normalised == "layer_norm"
    options = settings.get("activation_fn_kwargs", {})
    bias, rest = "b_enc", set()
    match settings["architecture"], settings["activation_fn_str"]:
        case "standard", "relu":
            sae = relu(W_dec, is_row_scaled=is_row_scaled)
        case "standard", "topk":
            expect(path, {"activation_fn_kwargs": sorted(options)}, activation_fn_kwargs=["k"])
            sae = topk(W_dec, whole_number(path, "k", options["k"]), is_row_scaled=is_row_scaled)
        case "gated", "relu":
            sae = gated(W_dec, is_row_scaled=is_row_scaled)
            bias, rest = "b_gate", GATE
        case found:
            raise CheckpointError(
                f"{path}: architecture and activation are {found}; known are standard with relu "
                "or topk, and gated with relu"
            )
    require_names(path, tensors, WEIGHTS | rest)
    return fill(
        sae,
        W_enc=tensors["W_enc"].T,
        b_enc=tensors[bias],
        W_dec=W_dec,
        b_dec=tensors["b_dec"],
        is_centred=True,
        **{name: tensors[name] for name in rest - {bias}},
    )
