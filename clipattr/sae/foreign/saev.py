"""saev: one line of JSON, then a state dict, in one file. Headers of its schemas 1 to 5."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae.foreign.reading import (
    Source,
    expect,
    named_tensors,
    read_pickle,
    require_names,
    whole_number,
)
from clipattr.sae.foreign.weights import fill, relu, sizes
from clipattr.sae.imported import SignedTopKSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import BatchTopKSae

# What saev takes where a header of schema 1 says nothing.
FIRST_TOP_K = 32
KINDS = ("Relu", "TopK", "BatchTopK")
THRESHOLD = "activation.threshold"
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def is_saev(path: Path) -> bool:
    """Whether a file opens with a JSON object, as neither a zip nor a pickle does."""
    with path.open("rb") as file:
        return file.read(1) == b"{"


def read_saev(source: Source) -> Sae:
    """ReLU, TopK (without a ReLU) and BatchTopK; the Matryoshka objective leaves no trace here."""
    path = source.path
    header, _, rest = path.read_bytes().partition(b"\n")
    schema, kind, top_k = _read_header(path, header)
    tensors = named_tensors(path, read_pickle(path, rest))
    is_batch = kind == "BatchTopK"
    require_names(path, tensors, {*WEIGHTS, THRESHOLD} if is_batch else WEIGHTS)
    W_dec = tensors["W_dec"]
    if kind == "Relu":
        sae = relu(W_dec)
    elif is_batch:
        sae = BatchTopKSae(**sizes(W_dec), k=whole_number(path, "top_k", top_k))
        sae.threshold.copy_(tensors[THRESHOLD].clamp_min(0.0))
    else:
        k = min(whole_number(path, "top_k", top_k), len(W_dec))
        sae = SignedTopKSae(**sizes(W_dec), k=k)
    return fill(
        sae,
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_enc"],
        W_dec=W_dec,
        b_dec=tensors["b_dec"],
        is_centred=_is_centred(source, schema, tensors["b_dec"]),
    )


def _read_header(path: Path, line: bytes) -> tuple[int, str, object]:
    """Schema (0 for none), activation and its top_k."""
    try:
        header = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{path}: opens with no line of JSON ({error})") from error
    schema = header.get("schema", 0)
    if schema not in range(6):
        raise CheckpointError(f"{path}: schema is {schema!r}, known are 1 to 5")
    if schema == 0:
        return schema, "Relu", None
    settings = header["cfg"]
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: cfg is {settings!r}, expected a JSON object")
    if schema == 1 and header.get("cls") in KINDS:
        return schema, header["cls"], settings.get("top_k", FIRST_TOP_K)
    # In the second form of schema 1 the activation may be left out, which makes it a TopK.
    default = {"cls": "TopK", "params": {}} if schema == 1 else None
    activation: dict[str, Any] = settings.get("activation", default) or settings["activation"]
    if activation["cls"] not in KINDS:
        raise CheckpointError(
            f"{path}: activation is {activation['cls']!r}; known are {', '.join(KINDS)}"
        )
    return schema, activation["cls"], activation["params"].get("top_k", FIRST_TOP_K)


def _is_centred(source: Source, schema: int, b_dec: Tensor) -> bool:
    """Until August 2025, in the middle of schema 1, the encoder read x - b_dec."""
    if schema <= 1 and b_dec.any():
        source.require_given(["subtract_b_dec"], '{"subtract_b_dec": True}')
        expect(source.path, {"type": type(source.given["subtract_b_dec"])}, type=bool)
        return source.given["subtract_b_dec"]
    source.require_given([], "{}")
    return False
