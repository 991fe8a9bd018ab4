"""What a search found, as plain numbers, and as a table for the terminal."""

from typing import NamedTuple

_LABEL_WIDTH = 24


class FoundLatent(NamedTuple):
    """One latent of an answer."""

    latent: int
    score: float
    labels: list[tuple[str, float]]
    """words with their scores, best first"""
    share_of_images: float | None
    """in which it fires; None where the atlas has no table"""
    examples: list[int]
    """rows of its images, strongest first"""
    page: str | None
    """in the atlas; None where it has no pages"""


class FoundAnswer(NamedTuple):
    """One question with both ends of the ranking."""

    question: str
    asked: dict[str, object]
    """the question for programs"""
    score: str
    """what the numbers are"""
    most: list[FoundLatent]
    least: list[FoundLatent]

    def to_json(self) -> dict[str, object]:
        """Plain fields, as files record them."""
        lists = {"most": self.most, "least": self.least}
        return {
            **self.asked,
            "score": self.score,
            **{name: [_to_json(each) for each in found] for name, found in lists.items()},
        }


def search_table(answer: FoundAnswer) -> str:
    """Both lists, a line per latent."""
    numbers = f"{'rank':>5} {'latent':>8} {'score':>8} {'images':>8}"
    lines = [
        f"{answer.question}; score: {answer.score}",
        f"  {numbers}  {'label':<{_LABEL_WIDTH}}  other labels",
        "  most aligned",
        *_lines(answer.most),
        "  least aligned",
        *_lines(answer.least),
    ]
    return "\n".join(lines)


def _lines(found: list[FoundLatent]) -> list[str]:
    lines = []
    for rank, each in enumerate(found, start=1):
        share = "-" if each.share_of_images is None else f"{100 * each.share_of_images:.1f} %"
        first, *others = [word for word, _ in each.labels]
        line = f"  {rank:>5} {each.latent:>8} {each.score:>+8.3f} {share:>8}  "
        lines.append((line + f"{first:<{_LABEL_WIDTH}}  {', '.join(others)}").rstrip())
    return lines


def _to_json(found: FoundLatent) -> dict[str, object]:
    labels = [{"word": word, "score": score} for word, score in found.labels]
    return {**found._asdict(), "labels": labels}
