"""sparsify: sae.safetensors and cfg.json."""

from clipattr.sae.foreign.reading import (
    Source,
    expect,
    read_safetensors,
    require_names,
    whole_number,
)
from clipattr.sae.foreign.weights import fill, sizes, topk
from clipattr.sae.sae import Sae
from clipattr.sae.transcoder import Transcoder

FILE = "sae.safetensors"


def read_sparsify(source: Source) -> Sae:
    """TopK(ReLU(W (x - b_dec) + b)); a transcoder is not centred, and either may have a skip."""
    path, settings = source.path, source.settings_of("cfg.json")
    tensors = read_safetensors(path)
    expect(path, settings, activation="topk")
    is_transcoder = bool(settings.get("transcode", False))
    has_skip = bool(settings.get("skip_connection", False))
    skip = {"W_skip"} if has_skip else set()
    require_names(path, tensors, {"encoder.weight", "encoder.bias", "W_dec", "b_dec", *skip})
    W_dec, k = tensors["W_dec"], whole_number(path, "k", settings["k"])
    is_plain = not is_transcoder and not has_skip
    return fill(
        topk(W_dec, k)
        if is_plain
        else Transcoder(**sizes(W_dec), d_out=W_dec.shape[1], k=k, skip=has_skip),
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=W_dec,
        b_dec=tensors["b_dec"],
        is_centred=not is_transcoder,
        **{name: tensors[name] for name in skip},
    )
