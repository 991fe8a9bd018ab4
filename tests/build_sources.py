"""Small sources for tests of `clipattr-shards`, and plain readers of what was built from them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (12, 9)) -> bytes:
    """Noise: no two are the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, image_format, **({"lossless": True} if image_format == "WEBP" else {})
    )
    return buffer.getvalue()


def write_photos(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Files with those names; name -> bytes."""
    contents = {name: photo(number) for number, name in enumerate(names)}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return contents


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> field -> bytes, by tarfile alone."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, field = member.name.partition(".")
            file = archive.extractfile(member)
            assert file is not None
            assert field not in samples.setdefault(key, {})
            samples[key][field] = file.read()
    return samples


def read_built(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples of all shards, in order; keys are unique."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.rglob("*.tar")):
        found = read_tar(path)
        assert not samples.keys() & found.keys()
        samples |= found
    return samples


def paths_of(samples: dict[str, dict[str, bytes]]) -> list[str]:
    """Where each sample came from, as its JSON says."""
    return [json.loads(fields["json"])["path"] for fields in samples.values()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
