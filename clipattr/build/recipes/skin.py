"""Skin lesions: ISIC 2019 and 2020 (the ISIC challenges) and HAM10000 (Tschandl et al. 2018).

None has public test labels of the same kind in its download, so all are to be split here: images
of one lesion, or of one patient, stay together. The cue is any column, such as sex or the place on
the body; ink, rulers and plasters are not annotated (find them by latents, or paste them).
"""

from functools import partial
from pathlib import Path

from clipattr.build.manifest import LABEL, PATH
from clipattr.build.recipes.listing import (
    Cells,
    Images,
    LeftOut,
    Official,
    Row,
    check_column,
    find_path,
    join_tables,
    list_rows,
    look_up,
    mark_cue,
    parse_cells,
    read_official,
)
from clipattr.build.sources import ItemError, Trouble, as_texts

# The columns of ISIC_2019_Training_GroundTruth.csv. UNK has no image in the training set.
DIAGNOSES_2019 = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AK": "actinic keratosis",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
    "SCC": "squamous cell carcinoma",
}
# The column dx of HAM10000.
DIAGNOSES_HAM = {
    "akiec": "actinic keratosis or intraepithelial carcinoma",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
OUTCOMES = {"0": "benign", "1": "malignant"}
ONE_HOT = {"1.0": "1", "1": "1", "0.0": "0", "0": "0"}


def read_isic2019(folder: Path, cue: str | None = None) -> Official:
    """ISIC_2019_Training_{Input/,GroundTruth.csv,Metadata.csv}: 25,331 images of 8 diagnoses.

    Ground truth: image, and 1.0 in the column of its diagnosis. Metadata: image, age_approx,
    anatom_site_general, lesion_id (empty for some), sex.
    """
    stem = "ISIC_2019_Training"
    truth = read_official(find_path(folder, f"{stem}_GroundTruth.csv"), "image", *DIAGNOSES_2019)
    known = read_official(find_path(folder, f"{stem}_Metadata.csv"), "image", "lesion_id")
    check_column(known, cue, "--cue-column")
    images = Images(folder, f"{stem}_Input")
    table = join_tables(truth, "image", known)
    listing = list_rows([table], partial(_make_2019, images=images, cue=cue))
    return Official(listing, folder, tuple(DIAGNOSES_2019.values()), together="lesion")


def _make_2019(cells: Cells, *, images: Images, cue: str | None) -> Row:
    codes = [name for name in (*DIAGNOSES_2019, "UNK") if name in cells]
    values = {name: look_up(cells, name, ONE_HOT, Trouble.malformed) for name in codes}
    chosen = [name for name, value in values.items() if value == "1"]
    if len(chosen) != 1 or chosen[0] not in DIAGNOSES_2019:
        what = f"{' and '.join(chosen) or 'no column'} is 1; allowed is one of "
        raise ItemError(Trouble.unknown_label, what + ", ".join(DIAGNOSES_2019))
    label = DIAGNOSES_2019[chosen[0]]
    row = parse_cells({name: cell for name, cell in cells.items() if name not in codes})
    row |= {
        PATH: images.find(cells["image"]),
        LABEL: label,
        "lesion": cells["lesion_id"] or cells["image"],
    }
    return mark_cue(row, label, cue)


def read_isic2020(folder: Path, cue: str | None = None) -> Official:
    """ISIC_2020_Training_GroundTruth.csv (Kaggle: train.csv) and train/ (Kaggle: jpeg/train/).

    Columns: image_name, patient_id, sex, age_approx, anatom_site_general_challenge, diagnosis,
    benign_malignant, target. Where ISIC_2020_Training_Duplicates.csv is there, too, the second
    image of each of its pairs is left out.
    """
    path = find_path(
        folder,
        "ISIC_2020_Training_GroundTruth_v2.csv",
        "ISIC_2020_Training_GroundTruth.csv",
        "train.csv",
    )
    table = read_official(path, "image_name", "patient_id", "target")
    check_column(table, cue, "--cue-column")
    pairs = folder / "ISIC_2020_Training_Duplicates.csv"
    second = "image_name_2"
    copies: set[str] = set()
    if pairs.exists():
        copies.update(as_texts(read_official(pairs, second).columns[second], second))
    images = Images(folder, "train", "jpeg/train", "ISIC_2020_Training_JPEG")
    make = partial(_make_2020, images=images, copies=copies, cue=cue)
    listing = list_rows([table], make)
    return Official(listing, folder, tuple(OUTCOMES.values()), together="patient_id")


def _make_2020(cells: Cells, *, images: Images, copies: set[str], cue: str | None) -> Row:
    if cells["image_name"] in copies:
        raise LeftOut("copies that ISIC lists")
    label = look_up(cells, "target", OUTCOMES, Trouble.unknown_label)
    row = parse_cells(cells) | {PATH: images.find(cells["image_name"]), LABEL: label}
    return mark_cue(row, label, cue)


def read_ham10000(folder: Path, cue: str | None = None) -> Official:
    """HAM10000_metadata(.csv), HAM10000_images_part_1/ and HAM10000_images_part_2/.

    Columns: lesion_id, image_id, dx, dx_type, age, sex, localization; newer: dataset. The 10,015
    images show 7,470 lesions.
    """
    path = find_path(folder, "HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
    table = read_official(path, "image_id", "lesion_id", "dx")
    check_column(table, cue, "--cue-column")
    images = Images(folder, "HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images")
    listing = list_rows([table], partial(_make_ham, images=images, cue=cue))
    return Official(listing, folder, tuple(DIAGNOSES_HAM.values()), together="lesion_id")


def _make_ham(cells: Cells, *, images: Images, cue: str | None) -> Row:
    label = look_up(cells, "dx", DIAGNOSES_HAM, Trouble.unknown_label)
    row = parse_cells(cells) | {PATH: images.find(cells["image_id"]), LABEL: label}
    return mark_cue(row, label, cue)
