"""SAELens: sae_weights.safetensors and cfg.json, as save_inference_model writes them."""

from clipattr.errors import CheckpointError
from clipattr.sae.foreign.reading import (
    Source,
    expect,
    read_safetensors,
    require_names,
    whole_number,
)
from clipattr.sae.foreign.weights import fill, gated, jump_relu, relu, topk
from clipattr.sae.sae import Sae

FILE = "sae_weights.safetensors"
NORMALISATIONS = ("none", "layer_norm")
IN_TRAINING = ("batchtopk", "matryoshka_batchtopk")


def read_saelens(source: Source) -> Sae:
    """TopK, ReLU, JumpReLU (which batchtopk and matryoshka_batchtopk become) and Gated."""
    path, settings = source.path, source.settings_of("cfg.json")
    tensors = read_safetensors(path)
    expect(path, settings, reshape_activations="none")
    normalised = settings["normalize_activations"]
    if normalised not in NORMALISATIONS:
        raise CheckpointError(
            f"{path}: normalize_activations is {normalised!r}; imported can be "
            f"{' or '.join(NORMALISATIONS)}, as SAELens writes what it has folded into the weights"
        )
    is_row_scaled = normalised == "layer_norm"
    W_dec, lengths = tensors["W_dec"], None
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    match settings["architecture"]:
        case "topk":
            sae = topk(W_dec, whole_number(path, "k", settings["k"]), is_row_scaled=is_row_scaled)
            if settings.get("rescale_acts_by_decoder_norm", False):
                lengths = W_dec.norm(dim=1)
        case "standard":
            sae = relu(W_dec, is_row_scaled=is_row_scaled)
        case "jumprelu":
            sae = jump_relu(W_dec, is_row_scaled=is_row_scaled)
            names |= {"threshold"}
        case "gated":
            sae = gated(W_dec, is_row_scaled=is_row_scaled)
            names = names - {"b_enc"} | {"b_gate", "r_mag", "b_mag"}
        case other:
            advice = "; save_inference_model saves it as jumprelu" if other in IN_TRAINING else ""
            raise CheckpointError(
                f"{path}: architecture is {other!r}; known are topk, standard, jumprelu and "
                f"gated{advice}"
            )
    require_names(path, tensors, names)
    return fill(
        sae,
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_gate" if "b_gate" in names else "b_enc"],
        W_dec=W_dec,
        b_dec=tensors["b_dec"],
        is_centred=settings["apply_b_dec_to_input"],
        lengths=lengths,
        **{name: tensors[name] for name in names & {"threshold", "r_mag", "b_mag"}},
    )
