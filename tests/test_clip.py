"""The model that travels with the package."""

import hashlib
import io
import json
import re

import torch
from PIL import Image
from torch.nn.functional import normalize

from clipattr.clip import embed_prompts, load_clip
from clipattr.clip.names import BUNDLED, WEIGHTS_FILE
from clipattr.world.prompts import ZEROSHOT
from clipattr.world.sampling import Split
from clipattr.world.shards import draw_samples


def test_bundled_model_knows_the_world():
    """Fails without the weights: a release that lacks them is broken."""
    weights = BUNDLED["planted-world"] / WEIGHTS_FILE
    card = (BUNDLED["planted-world"] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in re.findall(r"[0-9a-f]{64}", card)
    clip = load_clip("planted-world")
    samples = [next(draw_samples(Split.val, index, seed=20_000)) for index in range(64)]
    pictures = [Image.open(io.BytesIO(sample["jpg"])) for sample in samples]  # type: ignore[arg-type]
    with torch.no_grad():
        batch = torch.stack([clip.preprocess(picture) for picture in pictures])
        embeddings = normalize(clip.encode_image(batch), dim=1)
    factors = [json.loads(sample["json"]) for sample in samples]  # type: ignore[arg-type]
    for name in ("colour", "background"):
        task = ZEROSHOT[name]
        chosen = (embeddings @ embed_prompts(clip, list(task.prompts)).T).argmax(dim=1)
        right = [
            task.values[choice] == row[task.field]
            for choice, row in zip(chosen.tolist(), factors, strict=True)
        ]
        assert sum(right) / 64 >= 0.9, name
