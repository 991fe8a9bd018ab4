"""Which latents of an atlas answer a question: words, a picture, or another latent."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, UInt8
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.atomic import write_bytes, write_text
from clipattr.clip.templates import SLOT, load_templates
from clipattr.config.schema import Find
from clipattr.data.pixels import Pixels
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.atlas_words import embed_words, load_scorer
from clipattr.jobs.image_file import decode_image_file, read_image_file
from clipattr.jobs.start import Plan, describe_files
from clipattr.report.search import FoundAnswer, FoundLatent, search_table
from clipattr.report.search_picture import search_png
from clipattr.semantics.atlas_files import STEM, Atlas, load_atlas
from clipattr.semantics.search import Ranked, find_latents

logger = logging.getLogger(__name__)

NUMBERS, TABLE, PICTURE = "find.json", "find.txt", "find.png"
_LATENTS, _PAGE, _THUMBNAILS = "latents.parquet", "report/latent.html", "report/thumbs"
_OF_TEXT = "cosine of its images with the text, minus that with the vocabulary"
_OF_IMAGES = "cosine with its images, all less what the images of all latents share"


class Question(NamedTuple):
    """What is compared with the means of the latents."""

    name: str
    asked: dict[str, object]
    vector: Float[Tensor, " embed"]
    reference: Float[Tensor, " embed"] | None = None
    without: int | None = None
    picture: UInt8[Tensor, "3 height width"] | None = None


def find(config: Find, command: list[str]) -> None:
    """Print the table; write find.json, find.txt and find.png of the run."""
    plan = Plan(config, command, _describe_inputs(config), (NUMBERS, TABLE, PICTURE))
    if plan.is_finished():
        logger.info("%s", (Path(config.runs) / config.name / TABLE).read_text(encoding="utf-8"))
        return
    atlas = load_atlas(config.atlas)
    shares = _read_shares(Path(config.atlas), len(atlas.tensors.means))
    questions = _ask(config, atlas)
    answers = [_answer(config, atlas, shares, question) for question in questions]
    record = {
        "atlas": config.atlas,
        "scorer": atlas.origin.scorer,
        "answers": [answer.to_json() for answer in answers],
    }
    text = "\n\n".join(search_table(answer) for answer in answers)
    thumbnails = Path(config.atlas) / _THUMBNAILS
    picture = search_png(
        answers, thumbnails, n_examples=config.examples, asked=questions[0].picture
    )
    run = plan.open()
    write_text(run.path / NUMBERS, json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_text(run.path / TABLE, text + "\n")
    write_bytes(run.path / PICTURE, picture)
    run.finish()
    logger.info("%s", text)
    _log_pages(config, answers)


def _describe_inputs(config: Find) -> dict[str, object]:
    folder = Path(config.atlas)
    files = [folder / name for name in (f"{STEM}.json", f"{STEM}.safetensors", _LATENTS, _PAGE)]
    files += [] if config.image is None else [Path(config.image)]
    return {"files": describe_files(files)}


def _read_shares(folder: Path, n_latents: int) -> list[float] | None:
    """The share of images in which each latent fires, where the atlas has its table still."""
    path = folder / _LATENTS
    if not path.exists():
        return None
    try:
        shares = parquet.read_table(path, columns=["frequency"])["frequency"].to_pylist()
    except (OSError, ValueError, LookupError) as error:  # pyarrow's own are among them
        raise DataError(f"{path}: is no table of latents ({error}); make the atlas again") from None
    if len(shares) != n_latents:
        raise DataError(
            f"{path}: has {len(shares)} latents, {STEM}.safetensors beside it {n_latents}; make "
            "the atlas again"
        )
    return shares


def _ask(config: Find, atlas: Atlas) -> list[Question]:
    if config.latent is not None:
        return [_ask_latent(config.latent, config.atlas, atlas)]
    if config.image is not None:
        return [_ask_image(config.image, config, atlas)]
    return _ask_words(config, atlas)


def _ask_latent(latent: int, folder: str, atlas: Atlas) -> Question:
    """The means are enough: no model is loaded."""
    means = atlas.tensors.means
    if latent >= len(means):
        raise ConfigError(f"latent={latent}: the latents of {folder} are 0 to {len(means) - 1}")
    if means[latent].isnan().any():
        raise ConfigError(
            f"latent={latent}: fired on none of the images of {folder} ({atlas.origin.shards}), so "
            "there is nothing that another could be like"
        )
    label, _ = atlas.words_of(latent)[0]
    name = f"like latent {latent} ({label})"
    return Question(name, {"latent": latent}, means[latent], without=latent)


def _ask_image(path: str, config: Find, atlas: Atlas) -> Question:
    content = read_image_file(path)
    scorer = load_scorer(config.atlas, atlas, config.trainer.accelerator)
    pixels = Pixels(scorer.preprocess)
    picture = decode_image_file(pixels, content, path)
    image = pixels.normalise(picture.to(scorer.device))
    vector = normalize(scorer.encode_image(image[None])[0].detach().float().cpu(), dim=0)
    if not vector.isfinite().all():
        raise DataError(
            f"image={path}: its embedding by {scorer.name} in {scorer.precision} is not finite; "
            "make the atlas with scorer.precision=fp32 or bf16"
        )
    return Question(f"like {Path(path).name}", {"image": path}, vector, picture=picture)


def _ask_words(config: Find, atlas: Atlas) -> list[Question]:
    given = config.templates
    templates = tuple(atlas.origin.templates) if given is None else load_templates(given)
    words = embed_words(
        load_scorer(config.atlas, atlas, config.trainer.accelerator),
        atlas,
        config.queries,
        templates=templates,
        cache=Path(config.cache) / "text",
        progress=config.trainer.progress,
    )
    return [
        Question(
            _quote(text, templates),
            {"query": text, "templates": list(templates)},
            row,
            words.reference,
        )
        for text, row in zip(config.queries, words.rows, strict=True)
    ]


def _quote(text: str, templates: tuple[str, ...]) -> str:
    """As the scorer read it."""
    if len(templates) == 1:
        return f'"{templates[0].replace(SLOT, text)}"'
    return f'"{text}" in {len(templates)} prompts'


def _answer(
    config: Find, atlas: Atlas, shares: list[float] | None, question: Question
) -> FoundAnswer:
    def describe(ranked: Ranked) -> list[FoundLatent]:
        return [
            _describe(config, atlas, shares, latent, score)
            for latent, score in zip(ranked.latents.tolist(), ranked.scores.tolist(), strict=True)
        ]

    answer = find_latents(
        atlas.tensors.means,
        question.vector,
        question.reference,
        config.top,
        without=question.without,
    )
    return FoundAnswer(
        question.name,
        question.asked,
        _OF_IMAGES if question.reference is None else _OF_TEXT,
        describe(answer.most),
        describe(answer.least),
    )


def _describe(
    config: Find, atlas: Atlas, shares: list[float] | None, latent: int, score: float
) -> FoundLatent:
    page = Path(config.atlas) / _PAGE
    return FoundLatent(
        latent,
        score,
        atlas.words_of(latent),
        None if shares is None else shares[latent],
        [row for row in atlas.tensors.examples[latent].tolist() if row >= 0],
        f"{page}#{latent}" if page.exists() else None,
    )


def _log_pages(config: Find, answers: list[FoundAnswer]) -> None:
    logger.info("the picture: %s", Path(config.runs) / config.name / PICTURE)
    page = Path(config.atlas) / _PAGE
    if page.exists():
        for best in (answer.most[0].latent for answer in answers if answer.most):
            logger.info("the page of latent %d: %s#%d", best, page.resolve().as_uri(), best)
