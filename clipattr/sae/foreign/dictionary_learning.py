"""dictionary_learning: ae.pt and config.json."""

from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae.foreign.reading import Source, named_tensors, read_pickle, require_names
from clipattr.sae.foreign.weights import fill, gated, jump_relu, relu, sizes, topk
from clipattr.sae.prefixes import MatryoshkaSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import BatchTopKSae

FILE = "ae.pt"
LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec"}


def read_dictionary_learning(source: Source) -> Sae:
    """Every dictionary of theirs that is an SAE, by the name of its class."""
    path = source.path
    trainer = source.settings_of("config.json").get("trainer", {})
    tensors = named_tensors(path, read_pickle(path))
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    readers = {
        "AutoEncoder": (_auto_encoder, {*LINEAR, "bias"}, ()),
        "AutoEncoderNew": (_auto_encoder_new, {*LINEAR, "decoder.bias"}, ()),
        "AutoEncoderTopK": (_topk, {*LINEAR, "b_dec", "k"}, ("threshold",)),
        "BatchTopKSAE": (_batch_topk, {*LINEAR, "b_dec", "k", "threshold"}, ()),
        "GatedAutoEncoder": (
            _gated,
            {*LINEAR - {"encoder.bias"}, "decoder_bias", "r_mag", "gate_bias", "mag_bias"},
            (),
        ),
        "JumpReluAutoEncoder": (_jump_relu, {*PLAIN, "threshold"}, ()),
        "MatryoshkaBatchTopKSAE": (_matryoshka, {*PLAIN, "k", "threshold", "group_sizes"}, ()),
    }
    if kind not in readers:
        raise CheckpointError(
            f"{path}: trainer.dict_class is {kind!r}; known are {', '.join(readers)}"
        )
    read, needed, optional = readers[kind]
    require_names(path, tensors, needed, optional)
    return read(tensors)


def _linear(
    sae: Sae,
    tensors: dict[str, Tensor],
    b_dec: Tensor,
    *,
    is_centred: bool = True,
    lengths: Tensor | None = None,
) -> Sae:
    return fill(
        sae,
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["decoder.weight"].T,
        b_dec=b_dec,
        is_centred=is_centred,
        lengths=lengths,
    )


def _auto_encoder(tensors: dict[str, Tensor]) -> Sae:
    W_dec = tensors["decoder.weight"].T
    # Its own loader gives the rows of the decoder unit norm, by way of the encoder.
    return _linear(relu(W_dec), tensors, tensors["bias"], lengths=W_dec.norm(dim=1))


def _auto_encoder_new(tensors: dict[str, Tensor]) -> Sae:
    sae = relu(tensors["decoder.weight"].T)
    return _linear(sae, tensors, tensors["decoder.bias"], is_centred=False)


def _topk(tensors: dict[str, Tensor]) -> Sae:
    sae = topk(tensors["decoder.weight"].T, int(tensors["k"]))
    return _linear(sae, tensors, tensors["b_dec"])


def _batch_topk(tensors: dict[str, Tensor]) -> Sae:
    sae = BatchTopKSae(**sizes(tensors["decoder.weight"].T), k=int(tensors["k"]))
    # Before the first one is measured theirs is -1, and what is positive is active.
    sae.threshold.copy_(tensors["threshold"].clamp_min(0.0))
    return _linear(sae, tensors, tensors["b_dec"])


def _gated(tensors: dict[str, Tensor]) -> Sae:
    W_dec = tensors["decoder.weight"].T
    return fill(
        gated(W_dec),
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["gate_bias"],
        W_dec=W_dec,
        b_dec=tensors["decoder_bias"],
        is_centred=True,
        r_mag=tensors["r_mag"],
        b_mag=tensors["mag_bias"],
    )


def _plain(sae: Sae, tensors: dict[str, Tensor], *, is_centred: bool, **rest: Tensor) -> Sae:
    return fill(
        sae,
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        is_centred=is_centred,
        **rest,
    )


def _jump_relu(tensors: dict[str, Tensor]) -> Sae:
    sae = jump_relu(tensors["W_dec"])
    return _plain(sae, tensors, is_centred=False, threshold=tensors["threshold"])


def _matryoshka(tensors: dict[str, Tensor]) -> Sae:
    groups = tensors["group_sizes"]
    sae = MatryoshkaSae(
        **sizes(tensors["W_dec"]),
        k=int(tensors["k"]),
        fractions=tuple((groups / groups.sum()).tolist()),
    )
    threshold = tensors["threshold"].clamp_min(0.0)
    return _plain(sae, tensors, is_centred=True, threshold=threshold)
