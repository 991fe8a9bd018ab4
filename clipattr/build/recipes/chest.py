"""CheXpert: chest radiographs with 14 findings (Irvin et al. 2019), and tables of the same form.

The download holds train/, valid/, train.csv and valid.csv: Path (which begins with the name of the
download, such as CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg), Sex, Age,
Frontal/Lateral, AP/PA, then the findings: 1.0 yes, 0.0 no, -1.0 uncertain, empty: not mentioned.
A known shortcut: a treated pneumothorax shows its drain (Oakden-Rayner et al. 2020).
"""

from functools import partial
from pathlib import Path

from clipattr.build.manifest import LABEL, PATH
from clipattr.build.recipes.listing import (
    CUE,
    GROUP,
    SPLIT,
    Cells,
    LeftOut,
    Official,
    Row,
    check_column,
    find_path,
    list_rows,
    look_up,
    parse_cells,
    read_official,
)
from clipattr.build.sources import ItemError, Trouble
from clipattr.errors import ConfigError

VIEW = "Frontal/Lateral"
VIEWS = {"Frontal": "frontal", "Lateral": "lateral"}
PARTS = {"train": "train", "valid": "val"}
POLICIES = ("zeros", "ones", "ignore")
STATES = {"1.0": "1", "1": "1", "0.0": "0", "0": "0", "": "0", "-1.0": "-1", "-1": "-1"}


def read_chexpert(
    folder: Path,
    label: str = "Pneumothorax",
    cue: str = "Support Devices",
    *,
    uncertain: str = "ignore",
    view: str = "frontal",
) -> Official:
    """One finding is the label, another the cue; what is not mentioned is absent.

    Args:
        folder: of the download.
        label: a finding.
        cue: another.
        uncertain: what -1 of one of the two becomes: zeros, ones, or ignore, without the image.
        view: frontal, lateral, or all.
    """
    if uncertain not in POLICIES:
        raise ConfigError(f"--uncertain {uncertain}: allowed are {', '.join(POLICIES)}")
    if view not in (*VIEWS.values(), "all"):
        raise ConfigError(f"--view {view}: allowed are frontal, lateral, all")
    tables = [
        read_official(find_path(folder, f"{name}.csv"), "Path", VIEW) for name in ("train", "valid")
    ]
    for table in tables:
        check_column(table, label, "--label-column")
        check_column(table, cue, "--cue-column")
    make = partial(_make_row, label=label, cue=cue, uncertain=uncertain, view=view)
    classes = (f"no {label}", label)
    return Official(list_rows(tables, make), folder, classes, ("train", "val"), together="patient")


def _make_row(cells: Cells, *, label: str, cue: str, uncertain: str, view: str) -> Row:
    found = look_up(cells, VIEW, VIEWS, Trouble.malformed)
    if view not in (found, "all"):
        raise LeftOut(f"{found} views")
    path = _shorten(cells["Path"])
    has_label = _decide(cells, label, uncertain, Trouble.unknown_label)
    has_cue = _decide(cells, cue, uncertain, Trouble.malformed)
    name = label if has_label else f"no {label}"
    return parse_cells(cells) | {
        PATH: "/".join(path),
        LABEL: name,
        SPLIT: PARTS[path[0]],
        "patient": path[1],
        CUE: has_cue,
        GROUP: f"{name}, {cue if has_cue else f'no {cue}'}",
    }


def _shorten(path: str) -> list[str]:
    """From the folder of the split on: people rename the one above."""
    words = path.split("/")
    start = next((place for place, word in enumerate(words) if word in PARTS), None)
    if start is None or len(words) < start + 3:
        raise ItemError(Trouble.malformed, f"Path is {path!r}; .../train/PATIENT/... is expected")
    return words[start:]


def _decide(cells: Cells, column: str, uncertain: str, trouble: Trouble) -> bool:
    state = look_up(cells, column, STATES, trouble)
    if state == "-1" and uncertain == "ignore":
        raise LeftOut(f"uncertain {column}")
    return state == "1" or (state == "-1" and uncertain == "ones")
