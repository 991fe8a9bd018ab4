"""The tokenizer of the world: byte-pair merges under which each of its words is one token.

Only the merges are ours; the tokenizer that reads them is open_clip's SimpleTokenizer.
"""

import gzip
from collections import Counter
from itertools import pairwise

from clipattr.world.captions import OPENINGS
from clipattr.world.factors import BACKGROUNDS, COLOURS, NOUNS, TEXTURES, Sticker

GRAMMAR_WORDS = ("a", "on", "with", "shape", "cracked", "intact", "word")
MERGES_FILE = "bpe_merges.txt.gz"


def world_words() -> list[str]:
    """All words that captions and prompts of the world use, sorted."""
    phrases = [*OPENINGS, *GRAMMAR_WORDS, *NOUNS, *COLOURS, *TEXTURES, *BACKGROUNDS]
    phrases += [sticker.name for sticker in Sticker]
    return sorted({word for phrase in phrases for word in phrase.split()})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelled):
        pairs = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        if tuple(symbols[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(symbols[position])
            position += 1
    return merged


def merges_file_bytes() -> bytes:
    """The gzip file that SimpleTokenizer(bpe_path=...) reads, without a time stamp."""
    lines = ["#version: planted-world", *(" ".join(pair) for pair in learn_merges(world_words()))]
    return gzip.compress("\n".join(lines).encode(), mtime=0)
