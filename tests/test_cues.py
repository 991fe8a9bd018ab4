"""Cues of metadata, and the groups they make."""

import pytest
import torch

from clipattr.errors import ConfigError, DataError
from clipattr.shortcuts.cues import CueRule, group_images, parse_rule, read_cue


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("json:sticker", CueRule("sticker", None)),
        ("json:place=water", CueRule("place", "water")),
        ("json:Frontal/Lateral = Frontal", CueRule("Frontal/Lateral", "Frontal")),
        ("json:formula=a=b", CueRule("formula", "a=b")),
    ],
)
def test_rules(text: str, rule: CueRule):
    assert parse_rule(text) == rule
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize("text", ["place", "cls", "json:", "json:=x", "json:place=", "json: "])
def test_what_is_no_rule(text: str):
    with pytest.raises(ConfigError, match="write json:<field> or json:<field>=<value>"):
        parse_rule(text)


def has(values: list[object], text: str) -> list[bool | None]:
    """None where it is unknown."""
    cue = read_cue([{"other": 0, "f": value} for value in values], parse_rule(text))
    pairs = zip(cue.has.tolist(), cue.known.tolist(), strict=True)
    return [found if known else None for found, known in pairs]


def test_yes_and_no():
    yes = [True, 1, 1.0, "1", "1.0", "true", "True", "YES"]
    no = [False, 0, 0.0, "0", "0.0", "false", "No"]
    assert has([*yes, *no], "json:f") == [True] * len(yes) + [False] * len(no)
    assert has([True, None, "", float("nan"), False], "json:f") == [True, None, None, None, False]


def test_values():
    assert has(["water", "land", " water", None], "json:f=water") == [True, False, True, None]
    assert has([1, 1.0, "1.0", True, -1, "one"], "json:f=1") == [True] * 4 + [False] * 2
    assert has([True, "false", 1], "json:f=true") == [True, False, True]
    assert has(["a", "A"], "json:f=a") == [True, False]
    assert has([80.0, "80", 8], "json:f=80.0") == [True, True, False]


def test_a_list_has_every_value_in_it():
    values = [["tag", "seal"], ["seal"], [], None, "tag", [1, " tag "]]
    assert has(values, "json:f=tag") == [True, False, False, None, True, True]
    assert has(values, "json:f=1") == [False, False, False, None, False, True]
    with pytest.raises(DataError, match=r"says \['tag', 'seal'\], .* seal \(2\)"):
        read_cue([{"f": value} for value in values], parse_rule("json:f"))
    with pytest.raises(DataError, match=r"none of 1 images has it; its values are tag \(1\)"):
        read_cue([{"f": ["tag"]}], parse_rule("json:f=stamp"))


def test_messages():
    rows = [{"f": -1, "g": "x"}, {"f": 1, "g": "x"}, {"f": None, "g": "y"}]
    with pytest.raises(DataError, match=r"json:f: b0 says -1.0, .* json:f=VALUE; its values are"):
        read_cue(rows, parse_rule("json:f"), keys=["b0", "b1", "b2"])
    with pytest.raises(DataError, match=r"none of 3 images has it; .* x \(2\), y \(1\)"):
        read_cue(rows, parse_rule("json:g=z"))
    with pytest.raises(DataError, match="image 0 has no field 'h'; it has f, g"):
        read_cue(rows, parse_rule("json:h"))


def test_groups_by_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    values = torch.randint(0, 3, (200,), generator=generator).tolist()
    rows = [{"f": [True, False, None][value]} for value in values]
    groups = group_images(labels, read_cue(rows, parse_rule("json:f")), ["a", "b", "c"], "f")
    for label in range(3):
        for state, wanted in ((0, 1), (1, 0)):
            expected = sum(
                one == label and value == wanted
                for one, value in zip(labels.tolist(), values, strict=True)
            )
            assert groups.counts[label, state] == expected
    assert groups.n_unknown == values.count(2)
    assert groups.warnings() == [f"{values.count(2)} images say nothing of f and are left out"]


def test_warnings_of_empty_and_small_groups():
    labels = torch.tensor([0] * 30 + [1] * 13)
    rows = [{"f": n < 15 or n > 40} for n in range(43)]
    groups = group_images(labels, read_cue(rows, parse_rule("json:f")), ["a", "b", "c"], "f")
    assert groups.counts.tolist() == [[15, 15], [11, 2], [0, 0]]
    assert groups.warnings() == [
        "3 of 6 groups have fewer than 10 images, fewest 'c' without f (no images): an accuracy "
        "over them says little"
    ]
    one = group_images(labels, read_cue(rows, parse_rule("json:f")), ["a", "b"], "f")
    assert one.warnings() == ["the group 'b' with f has 2 images: an accuracy over it says little"]
    with pytest.raises(DataError, match="labels lie in"):
        group_images(labels, read_cue(rows, parse_rule("json:f")), ["a"], "f")
    with pytest.raises(DataError, match="43 cues"):
        group_images(labels[1:], read_cue(rows, parse_rule("json:f")), ["a", "b"], "f")
