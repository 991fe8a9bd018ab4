"""SAEs that other toolkits have trained, as SAEs of this one.

Nothing is unpickled but tensors and plain containers. What an SAE does to its input, and lengths
of its decoder's rows, move into the encoder: what comes out takes raw activations, and its codes
and reconstructions are those of the original. What is not known here, be it a setting or a tensor,
is refused by its name, and not left out.
"""

from collections.abc import Mapping
from pathlib import Path

from clipattr.errors import CheckpointError, ConfigError
from clipattr.sae.foreign import dictionary_learning, saelens, sparsify
from clipattr.sae.foreign.attributing_clip import is_attributing_clip, read_attributing_clip
from clipattr.sae.foreign.overcomplete import is_overcomplete, read_overcomplete
from clipattr.sae.foreign.prisma import is_prisma, read_prisma
from clipattr.sae.foreign.reading import Source, named_tensors, read_pickle
from clipattr.sae.foreign.saev import is_saev, read_saev
from clipattr.sae.sae import Sae

__all__ = ["import_sae"]

_READERS = {
    sparsify.FILE: sparsify.read_sparsify,
    saelens.FILE: saelens.read_saelens,
    dictionary_learning.FILE: dictionary_learning.read_dictionary_learning,
}
_SUFFIXES = (".pt", ".pth", ".ckpt")


def import_sae(path: Path | str, settings: Mapping[str, object] | None = None) -> Sae:
    """The SAE of another toolkit, for use (`eval`).

    `path` is a folder of sparsify, SAELens or dictionary_learning, or a file of saev, overcomplete,
    ViT-Prisma or attributing-clip (or the folder of that file alone). `settings` are what the
    toolkit does not write down, in its own words: a message says which are needed.
    `save_sae` keeps it, with a record of the model and the site that it belongs to.

    Raises:
        CheckpointError: for a file, a kind or a tensor that is not known here.
    """
    source = Source(_find(Path(path)), dict(settings or {}))
    try:
        return _read(source).eval()
    except KeyError as error:
        raise CheckpointError(f"{source.path}: {error} is missing, which is needed") from error
    except (
        ConfigError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        # Shapes that do not fit, and settings of another type than the toolkit writes.
        raise CheckpointError(f"{source.path}: {error}") from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in _READERS:
        if (path / name).is_file():
            return path / name
    files = sorted(file for suffix in _SUFFIXES for file in path.glob(f"*{suffix}"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} files: name one of them" if files else "no such file"
    raise CheckpointError(
        f"{path}: is no file, and as a folder holds none of {', '.join(_READERS)} (sparsify, "
        f"SAELens, dictionary_learning); with {', '.join(_SUFFIXES)} (saev, overcomplete, "
        f"ViT-Prisma, attributing-clip) it holds {found}. load_sae reads a folder of clipattr"
    )


def _read(source: Source) -> Sae:
    path = source.path
    if path.name in _READERS:
        return _READERS[path.name](source)
    if is_saev(path):
        return read_saev(source)
    content = read_pickle(path)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    tensors = named_tensors(path, content)
    if is_overcomplete(tensors):
        return read_overcomplete(source, tensors)
    if is_attributing_clip(tensors):
        return read_attributing_clip(source, tensors)
    if is_prisma(source, tensors):
        return read_prisma(source, tensors)
    raise CheckpointError(
        f"{path}: of none of the known toolkits; its tensors are {sorted(tensors)[:9]}. An SAE of "
        "ViT-Prisma needs its config.json in the same folder"
    )
