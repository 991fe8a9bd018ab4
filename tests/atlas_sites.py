"""A small atlas whose every number is a function of the latent and the class."""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from clipattr.report import Fact
from clipattr.report.atlas import (
    ClassEntry,
    ClassLatent,
    Column,
    Example,
    Label,
    LatentEntry,
    Overview,
    PairPoint,
    Reliance,
    UnexpectedEntry,
    write_site,
)

N_LATENTS = 250
N_CLASSES = 25
HOSTILE = "</script><img src=x onerror=\"window.hacked=1\">\u2028__proto__ 'quoted' & \u00e9"
HOSTILE_LATENT = 7
MISSING_IMAGE = 99_000_123
HEAT = [[0, 64, 128], [255, 192, 1]]
KINDS = ["typography", "spurious context", HOSTILE]

COLUMNS = [
    Column("frequency", "frequency", "share of images in which the latent fires"),
    Column("nearest", "nearest latent", "the latent of the most similar direction", True),
    Column("clarity", "clarity", "mean cosine of the strongest examples"),
]


def word(latent: int) -> str:
    return HOSTILE if latent == HOSTILE_LATENT else f"word{latent}"


def class_name(number: int) -> str:
    return HOSTILE if number == 3 else f"class name {number}"


def frequency(latent: int) -> float:
    """A different one for each latent, not in their order."""
    return latent * 37 % N_LATENTS / N_LATENTS


def latent_entry(latent: int) -> LatentEntry:
    is_dead = latent % 50 == 49
    top = [Example(latent * 3 + offset, 9.5 - offset) for offset in range(5)]
    if latent == HOSTILE_LATENT:
        top = [Example(0, 9.5, HEAT), Example(MISSING_IMAGE, 1.25)]
    numbers = {
        "frequency": frequency(latent),
        "nearest": float((latent + 1) % N_LATENTS),
        "clarity": None if is_dead else 1 / (latent + 1),
    }
    labels = [Label(word(latent), 0.3), Label("second", 0.123456789)]
    reliance = [Reliance(number, 0.5 - 0.1 * number, 0.25, 0.75, 0.1) for number in (3, 4)]
    return LatentEntry(
        latent=latent,
        labels=[] if is_dead else labels,
        margin=None if is_dead else 0.176543211,
        numbers=numbers,
        x=float(latent % 16),
        y=float(latent // 16),
        top=[] if is_dead else top,
        spread=[] if is_dead else top[:2],
        reliance=[] if is_dead else reliance,
        is_dead=is_dead,
    )


def pair(number: int, place: int) -> ClassLatent:
    """Latent `place` of a class; the first three of each are unexpected, and of lower evidence."""
    is_unexpected = place < 3
    return ClassLatent(
        latent=(number * 10 + place + HOSTILE_LATENT) % N_LATENTS,
        mean_attribution=0.5 - 0.01 * place - 0.001 * number,
        share_of_images=0.5,
        share_positive=None if place == 1 else 0.75,
        alignment=-0.2 if is_unexpected else 0.3 + 0.01 * place,
        is_unexpected=is_unexpected,
        evidence=(0.5 - 0.01 * place - 0.001 * number) / 2,
        kind=KINDS[place] if is_unexpected else "",
        reasons=[f"reason {number}", HOSTILE] if is_unexpected else [],
        counterpart=HOSTILE_LATENT if place == 0 else None,
    )


def class_entry(number: int) -> ClassEntry:
    n_more = 1234 if number == 5 else 0
    return ClassEntry(number, [pair(number, place) for place in range(30)], n_more)


def unexpected() -> list[UnexpectedEntry]:
    entries = [
        UnexpectedEntry(number, pair(number, place))
        for number in range(N_CLASSES)
        for place in range(3)
    ]
    return sorted(entries, key=lambda each: -each.pair.evidence)


def overview() -> Overview:
    # One unexpected point in a corner of its own, so that a test can find it by its colour.
    points = [PairPoint(n, (n * 10) % N_LATENTS, 0.2 + n / 100, 0.1, False) for n in range(20)]
    points.append(PairPoint(5, 57, -0.4, 0.9, True))
    return Overview(
        title="Atlas <of> latents",
        subtitle="A subtitle",
        summary=["75 pairs are unexpected.", HOSTILE],
        facts=[Fact("latents", "250", "of the dictionary")],
        columns=COLUMNS,
        class_names=[class_name(number) for number in range(N_CLASSES)],
        score_name="cosine",
        over="all images",
        map_shares=(0.0312, 0.0251),
        unexpected=unexpected(),
        if_empty="Nothing is above chance.",
        points=points,
        manifest={"command": f"python {HOSTILE}"},
    )


def write(folder: Path) -> Path:
    latents = (latent_entry(latent) for latent in range(N_LATENTS))
    classes = (class_entry(number) for number in range(N_CLASSES))
    return write_site(folder, overview(), latents, classes)


def write_thumbnails(folder: Path) -> None:
    """A grey picture for every image of the atlas but one."""
    for image in images():
        path = folder / "thumbs" / str(image // 1000) / f"{image}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), image % 256).save(path)


def images() -> Iterator[int]:
    for latent in range(N_LATENTS):
        for example in latent_entry(latent).top:
            if example.image != MISSING_IMAGE:
                yield example.image


def read_data(folder: Path, name: str):
    """What data/<name>.js hands over."""
    text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
    start = f'atlas.put("{name}",'
    assert text.startswith(start)
    assert text.endswith(");\n")
    return json.loads(text[len(start) : -3])
