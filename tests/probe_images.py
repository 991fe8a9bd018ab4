"""Labelled noise with a cue that goes with the label, for the jobs on probes: tiny, all known."""

import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.schema import TRAIN_JOBS
from clipattr.main import run_script
from clipattr.sae import SaeRecord, TopKSae, save_sae
from tests.tars import write_shard
from tests.tiny import save_tiny_clip

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "probe.yaml"
N_LATENTS, K = 24, 4
SITES = {"cls": Site(1), "spatial": Site(0, "residual", "spatial")}


class Split:
    """Images of which most with the cue have label 1; the label itself is hard to see."""

    def __init__(self, folder: Path, n_images: int, *, seed: int, share: float) -> None:
        self.folder = folder
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (n_images,), generator=draw)
        agrees = torch.rand(n_images, generator=draw) < share
        self.cue = torch.where(agrees, self.labels, 1 - self.labels).bool()
        self.other = torch.randint(2, (n_images,), generator=draw)
        pixels = torch.randint(0, 256, (n_images, 32, 32, 3), generator=draw, dtype=torch.uint8)
        pixels[:, 8:24, 8:24, 0] = (60 + 90 * self.labels).byte()[:, None, None]
        pixels[self.cue, :, :6] = 255
        self.pictures = [Image.fromarray(one.numpy()) for one in pixels]
        folder.mkdir()
        samples = [self._sample(number) for number in range(n_images)]
        write_shard(folder / "000.tar", samples[: n_images // 3])
        write_shard(folder / "001.tar", samples[n_images // 3 :])

    def _sample(self, number: int) -> dict[str, object]:
        buffer = io.BytesIO()
        self.pictures[number].save(buffer, "PNG")
        content = {
            "cue": bool(self.cue[number]),
            "label": int(self.labels[number]),
            "other": int(self.other[number]),
        }
        return {
            "__key__": f"{number:03d}",
            "png": buffer.getvalue(),
            "cls": str(int(self.labels[number])).encode(),
            "json": json.dumps(content).encode(),
        }


class Setup:
    """A tiny model, two splits, an SAE at each of two sites, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny")
        self.clip = load_clip(self.model)
        self.tower = image_tower(self.clip.model)
        self.training = Split(folder / "training", 90, seed=0, share=0.8)
        self.validation = Split(folder / "validation", 60, seed=1, share=0.5)
        self.saes = {name: self._sae(name, site) for name, site in SITES.items()}

    def pixels(self, split: Split) -> Tensor:
        return torch.stack([self.clip.preprocess(one) for one in split.pictures])

    def _sae(self, name: str, site: Site) -> TopKSae:
        generator = torch.Generator().manual_seed(0)
        sae = TopKSae(d_model=32, n_latents=N_LATENTS, k=K, generator=generator)
        with torch.no_grad():
            x = self.tower.cut(site).read(self.pixels(self.training))
            sae.initialise_from(x.flatten(0, -2))
        model = {"name": self.model, "weights_sha256": self.clip.weights_sha256}
        save_sae(sae, self.folder / f"sae-{name}", SaeRecord(site.to_json(), model, "data"))
        return sae.requires_grad_(False)

    def words(self, name: str, *overrides: str, cache: str = "cache") -> list[str]:
        common = {
            "name": name,
            "model.name": self.model,
            "data.shards": str(self.training.folder),
            "data.cache": str(self.folder / cache),
            "data.workers": "0",
            "data.batch_size": "32",
            "runs": str(self.folder / "runs"),
            "probe.classes": "[dark, bright]",
            "probe.batch_size": "32",
            "trainer.steps": "30",
            "trainer.checkpoint_every": "10",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        common |= dict(one.split("=", 1) for one in overrides)
        return [str(CONFIG), *(f"{key}={value}" for key, value in common.items())]

    def run(self, name: str, *overrides: str) -> Path:
        """The folder of the finished run."""
        assert run_script("train.py", TRAIN_JOBS, self.words(name, *overrides)) == 0
        return self.folder / "runs" / name

    @property
    def chosen_on(self) -> str:
        return f"validation={self.validation.folder}"
