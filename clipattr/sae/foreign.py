"""SAEs that other toolkits have trained, as SAEs of this one.

Read are the folders that they write themselves: sparsify (sae.safetensors), SAELens
(sae_weights.safetensors) and dictionary_learning (ae.pt). Nothing is unpickled but tensors. What an
SAE does to its input, and lengths of its decoder's rows, move into the encoder: what comes out
takes raw activations, and its codes and reconstructions are those of the original. What is not
known here is refused by its name, and not left out.
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Generator, Tensor

from clipattr.errors import CheckpointError, ConfigError
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relu import JumpReluSae, ReluSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import BatchTopKSae, TopKSae

SPARSIFY, SAELENS, DICTIONARY_LEARNING = "sae.safetensors", "sae_weights.safetensors", "ae.pt"
# A threshold of zero, as its logarithm.
SMALLEST_THRESHOLD = 1e-30


def import_sae(folder: Path | str) -> Sae:
    """The SAE in a folder of sparsify, SAELens or dictionary_learning, for use (`eval`).

    `save_sae` keeps it, with a record of the model and the site that it belongs to.

    Raises:
        CheckpointError: for a folder, a field or a tensor that is not known here.
    """
    folder = Path(folder)
    readers = {
        SPARSIFY: _read_sparsify,
        SAELENS: _read_saelens,
        DICTIONARY_LEARNING: _read_dictionary_learning,
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            try:
                return read(folder).eval()
            except KeyError as error:
                raise CheckpointError(f"{folder}: lacks {error}, which {name} needs") from error
            except ConfigError as error:
                raise CheckpointError(f"{folder}: {error}") from error
    raise CheckpointError(
        f"{folder}: holds none of {', '.join(readers)}, as sparsify, SAELens and "
        "dictionary_learning write them; load_sae reads a folder of clipattr"
    )


def _read_sparsify(folder: Path) -> Sae:
    settings, tensors = _read_json(folder / "cfg.json"), _read_tensors(folder / SPARSIFY)
    _expect(folder, settings, activation="topk", skip_connection=False, transcode=False)
    return _fill(
        _topk(tensors["W_dec"], settings["k"]),
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
    )


def _read_saelens(folder: Path) -> Sae:
    settings, tensors = _read_json(folder / "cfg.json"), _read_tensors(folder / SAELENS)
    _expect(folder, settings, normalize_activations="none", reshape_activations="none")
    lengths = tensors["W_dec"].norm(dim=1)
    if not settings.get("rescale_acts_by_decoder_norm", False):
        lengths = torch.ones_like(lengths)
    match settings["architecture"]:
        case "topk":
            sae = _topk(tensors["W_dec"], settings["k"])
        case "standard":
            sae = ReluSae(**_sizes(tensors["W_dec"]), sparsity=0.0)
        case "jumprelu":
            sae = _jump_relu(tensors["W_dec"], tensors["threshold"])
        case other:
            raise CheckpointError(
                f"{folder}: architecture is {other!r}; known are topk, standard and jumprelu (as "
                "which SAELens saves its batchtopk)"
            )
    return _fill(
        sae,
        W_enc=tensors["W_enc"].T * lengths[:, None],
        b_enc=tensors["b_enc"] * lengths,
        W_dec=tensors["W_dec"] / lengths[:, None],
        b_dec=tensors["b_dec"],
        is_centred=settings["apply_b_dec_to_input"],
    )


def _read_dictionary_learning(folder: Path) -> Sae:
    trainer = _read_json(folder / "config.json").get("trainer", {})
    tensors = _read_tensors(folder / DICTIONARY_LEARNING)
    W_dec = tensors["decoder.weight"].T
    match trainer.get("dict_class"):
        case "AutoEncoderTopK":
            sae = _topk(W_dec, int(tensors["k"]))
        case "BatchTopKSAE":
            sae = BatchTopKSae(**_sizes(W_dec), k=int(tensors["k"]))
            sae.threshold.copy_(tensors["threshold"].clamp_min(0.0))
        case "AutoEncoder":
            sae = ReluSae(**_sizes(W_dec), sparsity=0.0)
            # Its own loader gives the rows of the decoder unit norm, by way of the encoder.
            return _fill(
                sae,
                W_enc=tensors["encoder.weight"] * W_dec.norm(dim=1, keepdim=True),
                b_enc=tensors["encoder.bias"] * W_dec.norm(dim=1),
                W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
                b_dec=tensors["bias"],
            )
        case other:
            raise CheckpointError(
                f"{folder}: trainer.dict_class is {other!r}; known are AutoEncoderTopK, "
                "BatchTopKSAE and AutoEncoder"
            )
    return _fill(
        sae,
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=W_dec,
        b_dec=tensors["b_dec"],
    )


def _sizes(W_dec: Tensor) -> dict[str, Any]:
    n_latents, d_model = W_dec.shape
    return {
        "d_model": d_model,
        "n_latents": n_latents,
        "normalisation": Normalisation.none,
        # Its own generator: importing must not move the global random state.
        "generator": Generator(),
    }


def _topk(W_dec: Tensor, k: int) -> TopKSae:
    return TopKSae(**_sizes(W_dec), k=k)


def _jump_relu(W_dec: Tensor, threshold: Tensor) -> JumpReluSae:
    sae = JumpReluSae(**_sizes(W_dec), sparsity=0.0)
    sae.log_theta.data.copy_(threshold.clamp_min(SMALLEST_THRESHOLD).log())
    return sae


@torch.no_grad()
def _fill(
    sae: Sae,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    is_centred: bool = True,
) -> Sae:
    """Copy the weights; z = W_enc (x - b_dec) + b_enc, where the input is centred at b_dec."""
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        parameter = getattr(sae, name)
        if parameter.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.copy_(tensor)
    if is_centred:
        sae.b_enc.copy_(b_enc.double() - W_enc.double() @ b_dec.double())
    return sae


def _expect(folder: Path, settings: Mapping[str, Any], **expected: object) -> None:
    for name, value in expected.items():
        found = settings.get(name, value)
        if found != value:
            raise CheckpointError(f"{folder}: {name} is {found!r}; imported can be {value!r} alone")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():  # of pickles that it does not read
                warnings.filterwarnings("ignore", ".*pickle protocol")
                tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged; nothing else is unpickled, because a "
            "pickle could run code"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path}: holds no named tensors")
    return {name: tensor.float() for name, tensor in tensors.items()}
