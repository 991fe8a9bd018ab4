from pathlib import Path

import pytest

from clipattr.errors import ConfigError, DataError
from clipattr.semantics.vocabulary import load_vocabulary


def test_words_come_once_in_order_with_all_their_origins(tmp_path: Path):
    nouns, colours = tmp_path / "nouns.txt", tmp_path / "colours.txt"
    nouns.write_bytes("\ufeff# nouns\ncat\n\n  rainbow flag \r\ncat\nna\u00efve\n".encode())
    colours.write_text("red\nrainbow flag\n")
    found = load_vocabulary([str(nouns), "tench", str(colours), " cat", "imagenet"])
    assert found.words[:5] == ("cat", "rainbow flag", "na\u00efve", "tench", "red")
    assert len(found.words) == len(set(found.words)) == len(found.origins)
    origins = dict(zip(found.words, found.origins, strict=True))
    assert origins["cat"] == (str(nouns), "given")
    assert origins["rainbow flag"] == (str(nouns), str(colours))
    assert origins["tench"] == ("given", "imagenet")
    assert origins["goldfish"] == ("imagenet",)
    # nouns, given, colours, imagenet; its 1,000 names have two pairs of the same words.
    assert [(source.n_words, source.n_new) for source in found.sources] == [
        (4, 3),
        (2, 1),
        (2, 1),
        (1000, 997),
    ]
    assert found.n_duplicates == 1008 - len(found.words)


def test_a_word_with_a_dot_is_a_word():
    assert load_vocabulary(["St. Bernard", "U.S", "C#"]).words == ("St. Bernard", "U.S", "C#")


@pytest.mark.parametrize("entry", ["nouns.txt", "lists/nouns", "nouns.TSV"])
def test_a_file_that_is_missing_is_not_a_word(entry: str):
    with pytest.raises(ConfigError, match=f"'{entry}': no such file"):
        load_vocabulary(["cat", entry])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no words"),
        (b"\n# only\n  \n", "has no words"),
        (b"cat\ndog\ncaf\xe9\n", "line 3: is not UTF-8"),
    ],
)
def test_a_file_without_words_is_an_error(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"words.txt.*{message}"):
        load_vocabulary([str(path)])


@pytest.mark.parametrize("entries", [[], ["cat"], ["cat", "cat "]])
def test_one_word_is_no_choice(entries: list[str]):
    with pytest.raises(ConfigError, match="two or more"):
        load_vocabulary(entries)


def test_a_blank_entry_is_an_error():
    with pytest.raises(ConfigError, match="blank"):
        load_vocabulary(["cat", " "])
