"""Miniature official downloads, as the originals are spelt, and what becomes of them.

The download is in the folder `download` of the current one, the shards in `out`.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

from clipattr.data.index import build_index
from clipattr.data.shards import find_shards, read_json, read_label
from clipattr.shards_cli import run_shards
from tests.build_sources import photo

Samples = dict[str, dict[str, object]]
SEXES = ["", "female", "male"]
CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    """Pictures of 32 x 32 pixels, each with bytes of its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        path.write_bytes(photo(zlib.crc32(name.encode()), kind, (32, 32)))


def write_lines(path: Path, *lines: str) -> None:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def waterbirds(folder: Path, n: int = 24) -> list[tuple[str, int, int, int]]:
    """Two images per split, bird and place; returns (path, y, split, place)."""
    rows = []
    for number in range(n):
        split, y, place = number // 4 % 3, number // 2 % 2, number % 2
        species = "001.Black_footed_Albatross" if y else "017.Cardinal"
        rows.append((f"{species}/Bird_{number:04d}.jpg", y, split, place))
    write_pictures(folder, [row[0] for row in rows])
    lines = [
        f"{number},{path},{y},{split},{place},/{'o/ocean' if place else 'b/bamboo_forest'}/1.jpg"
        for number, (path, y, split, place) in enumerate(rows, start=1)
    ]
    header = "img_id,img_filename,y,split,place,place_filename"
    write_lines(folder / "metadata.csv", header, *lines)
    return rows


def celeba(
    folder: Path, n: int = 12, *, is_kaggle: bool = False
) -> list[tuple[str, int, int, int]]:
    """Faces, a third in each split, and four attributes; returns (file, blond, male, split)."""
    rows = [
        (f"{number + 1:06d}.jpg", number % 2, number // 2 % 2, number // (n // 3))
        for number in range(n)
    ]
    inner = "img_align_celeba/img_align_celeba" if is_kaggle else "img_align_celeba"
    write_pictures(folder, [f"{inner}/{row[0]}" for row in rows])
    signs = ["-1", "1"]
    names = ["Bald", "Blond_Hair", "Eyeglasses", "Male"]
    cells = [
        [file, "-1", signs[blond], signs[place // 4 % 2], signs[male]]
        for place, (file, blond, male, _) in enumerate(rows)
    ]
    if is_kaggle:
        header = ",".join(["image_id", *names])
        write_lines(folder / "list_attr_celeba.csv", header, *(",".join(one) for one in cells))
        parts = [f"{row[0]},{row[3]}" for row in rows]
        write_lines(folder / "list_eval_partition.csv", "image_id,partition", *parts)
    else:
        lines = ["{} {:>2} {:>2} {:>2} {:>2}".format(*one) for one in cells]
        write_lines(folder / "list_attr_celeba.txt", str(n), " ".join(names) + " ", *lines)
        write_lines(folder / "list_eval_partition.txt", *(f"{row[0]} {row[3]}" for row in rows))
    return rows


def isic2019(folder: Path, n: int = 96) -> list[tuple[str, str, str]]:
    """Images in pairs of one lesion, some without one; returns (image, code, lesion)."""
    codes = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]
    stem = folder / "ISIC_2019_Training"
    rows = []
    for number in range(n):
        image = f"ISIC_{number:07d}" + ("_downsampled" if number % 5 == 0 else "")
        lesion = "" if number % 8 >= 6 else f"BCN_{number // 2:07d}"
        rows.append((image, codes[number // 2 % 8], lesion))
    write_pictures(folder, [f"ISIC_2019_Training_Input/{row[0]}.jpg" for row in rows])
    truth = [
        ",".join([image, *("1.0" if code == one else "0.0" for one in [*codes, "UNK"])])
        for image, code, _ in rows
    ]
    write_lines(Path(f"{stem}_GroundTruth.csv"), ",".join(["image", *codes, "UNK"]), *truth)
    known = [
        f"{image},{55.0 if number % 3 else ''},anterior torso,{lesion},{SEXES[number % 3]}"
        for number, (image, _, lesion) in enumerate(rows)
    ]
    header = "image,age_approx,anatom_site_general,lesion_id,sex"
    # Rows are not in the order of the ground truth: they are joined by name.
    write_lines(Path(f"{stem}_Metadata.csv"), header, *reversed(known))
    return rows


def isic2020(folder: Path, n: int = 96, *, is_kaggle: bool = False) -> list[tuple[str, str, int]]:
    """Four images per patient; returns (image, patient, target)."""
    rows = [(f"ISIC_{number:07d}", f"IP_{number // 4:07d}", number % 2) for number in range(n)]
    inner, table = (
        ("jpeg/train", "train.csv")
        if is_kaggle
        else (
            "train",
            "ISIC_2020_Training_GroundTruth.csv",
        )
    )
    write_pictures(folder, [f"{inner}/{row[0]}.jpg" for row in rows])
    outcomes = ["benign", "malignant"]
    lines = [
        f"{image},{patient},{SEXES[1 + number // 4 % 2]},45.0,head/neck,unknown,"
        f"{outcomes[target]},{target}"
        for number, (image, patient, target) in enumerate(rows)
    ]
    header = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
    write_lines(folder / table, f"{header}benign_malignant,target", *lines)
    return rows


def ham10000(folder: Path, n: int = 40) -> list[tuple[str, str, str]]:
    """Two images per lesion, one in each folder; returns (image, dx, lesion)."""
    codes = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
    rows = [
        (f"ISIC_{number:07d}", codes[number // 2 % 7], f"HAM_{number // 2:07d}")
        for number in range(n)
    ]
    names = [f"HAM10000_images_part_{place % 2 + 1}/{row[0]}.jpg" for place, row in enumerate(rows)]
    write_pictures(folder, names)
    lines = [
        f"{lesion},{image},{dx},histo,{'' if dx == 'df' else '80.0'},{SEXES[1 + number % 2]},scalp"
        for number, (image, dx, lesion) in enumerate(rows)
    ]
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization"
    write_lines(folder / "HAM10000_metadata.csv", header, *lines)
    return rows


def chexpert(folder: Path, n: int = 32) -> list[tuple[str, str, str, str]]:
    """Frontal and lateral views; returns (path, view, Pneumothorax, Support Devices)."""
    states = ["1.0", "0.0", "", "-1.0"]
    rows = []
    for number in range(n):
        part = "valid" if number >= n * 3 // 4 else "train"
        view = "Lateral" if number % 6 == 5 else "Frontal"
        study = f"{part}/patient{number // 2:05d}/study{number % 2 + 1}"
        finding = states[number % 4] if part == "train" else states[number % 2]
        device = states[number // 2 % 3]
        rows.append((f"{study}/view1_{view.lower()}.jpg", view, finding, device))
    write_pictures(folder, [row[0] for row in rows])
    for part in ("train", "valid"):
        lines = [
            f"CheXpert-v1.0-small/{path},Female,68,{view},AP,,,,,,,,,,{finding},,,,{device}"
            for path, view, finding, device in rows
            if path.startswith(part)
        ]
        write_lines(folder / f"{part}.csv", CHEXPERT, *lines)
    return rows


def metashift(folder: Path, *, has_splits: bool, more: int = 0) -> list[str]:
    """Cats and dogs, two contexts each; images 2 and 3 are in two contexts. Returns the paths.

    `more` images of each in one context alone.
    """
    names = []
    for split, first in (("train", 0), ("test", 100)) if has_splits else (("", 0),):
        for place, label in enumerate(("cat", "dog")):
            for context, numbers in (("sofa", (0, 1, 2, 3)), ("bed", (2, 3, 4))):
                inner = f"{split}/{label}/" if has_splits else ""
                alone = range(1000, 1000 + more) if context == "sofa" else range(2000, 2000 + more)
                images = [first + 50 * place + number for number in numbers]
                images += [5000 * place + 50 * first + number for number in alone]
                names += [f"{inner}{label}({context})/{2315000 + image}.jpg" for image in images]
    write_pictures(folder, names)
    return names


def convert(recipe: str, *options: str) -> int:
    return run_shards([recipe, "download", "out", "--workers", "0", *options])


def read_back(split: str) -> Samples:
    """Path -> JSON with the class that `read_label` gives, by our own index; images are equal."""
    folder = Path("out") / split
    classes = (folder / "classes.txt").read_text().splitlines()
    index = build_index(find_shards(str(folder)), cache=None)
    found: Samples = {}
    for row in range(len(index)):
        sample = index.sample(row)
        content = read_json(sample)
        by_number = read_label(sample, "cls", classes)
        if not str(content["label"]).isdecimal():
            assert read_label(sample, "json:label", classes) == by_number
        assert sample.image_field is not None
        image = (Path("download") / str(content["path"])).read_bytes()
        assert sample.read(sample.image_field) == image
        found[str(content["path"])] = content | {"class": classes[by_number]}
    return found


def splits() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir() if path.is_dir())


def read_all() -> dict[str, Samples]:
    return {split: read_back(split) for split in splits()}
