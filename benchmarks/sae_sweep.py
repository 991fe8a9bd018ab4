"""Wall time of a grid of SAEs over that of one of them, both from image shards and with no cache.

    python benchmarks/sae_sweep.py [--images 1024] [--steps 40] [--rounds 3] [--model ViT-B-32]

`train.py` as a user runs it, in a process of its own: shards are indexed, JPEGs decoded, CLIP runs
once over the pictures, the SAEs are trained, measured and saved. Random weights, 768 -> 3,072
latents, steps of 1,024 rows: a few seconds of training beside the forward of CLIP, as on real data,
where a picture costs more than its row does in all epochs. The printed shares say what dominated.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import default_bpe
from PIL import Image
from safetensors.torch import save_file
from webdataset.writer import TarWriter

ROOT = Path(__file__).parents[1]
SIDE, HELD_OUT = 256, 64
ONE, FOUR = "sae.k=32", "sae.k=[8,16,32,64]"


def write_images(path: Path, n_images: int, seed: int) -> None:
    """A shard of JPEGs: blurred noise."""
    draw = np.random.default_rng(seed)
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for number in range(n_images):
            coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            content = BytesIO()
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(content, "JPEG", quality=90)
            writer.write({"__key__": f"{number:08d}", "jpg": content.getvalue()})


def write_model(folder: Path, name: str) -> None:
    """An open_clip folder with random weights."""
    folder.mkdir()
    model = open_clip.create_model(name)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": {"mean": mean, "std": std},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    shutil.copyfile(default_bpe(), folder / "bpe_simple_vocab_16e6.txt.gz")


def run(folder: Path, name: str, steps: int, sae: str) -> float:
    """Seconds of a whole job with a cache of its own."""
    command = [
        *(sys.executable, "train.py", "configs/demo/sae.yaml"),
        *(f"runs={folder / 'runs'}", f"name={name}", f"data.cache={folder / name}", sae),
        f"model.name=local-dir:{folder / 'clip'}",
        *(f"data.shards={folder / 'train.tar'}", f"held_out={folder / 'held_out.tar'}"),
        *("sae.n_latents=3072", "sae.batch_size=1024", f"trainer.steps={steps}"),
        "trainer.progress=false",
    ]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "clip", options.model)
        write_images(folder / "train.tar", options.images, seed=0)
        write_images(folder / "held_out.tar", HELD_OUT, seed=1)
        turns = [
            {
                "four": run(folder, f"four-{turn}", options.steps, FOUR),
                "one": run(folder, f"one-{turn}", options.steps, ONE),
                "one, no step": run(folder, f"none-{turn}", 1, ONE),
            }
            for turn in range(options.rounds)
        ]
    print(f"{options.model}, {options.images} images, {torch.get_num_threads()} threads")
    for each in turns[0]:
        print(f"{each:14} {statistics.median(turn[each] for turn in turns):8.1f} s")
    ratios = [turn["four"] / turn["one"] for turn in turns]
    print(f"four / one: {statistics.median(ratios):.2f}  {[round(ratio, 2) for ratio in ratios]}")


if __name__ == "__main__":
    main()
