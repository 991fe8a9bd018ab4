"""A CLIP of a few thousand random weights, as an open_clip folder: what most tests run on."""

import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from clipattr.clip.names import BUNDLED, CONFIG_FILE, MERGES_FILE, WEIGHTS_FILE

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 644,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def save_tiny_clip(folder: Path, *, seed: int = 0, **changes: object) -> str:
    """Write the folder; returns the name that `load_clip` takes. `changes` are of model_cfg."""
    folder.mkdir(parents=True)
    config = CONFIG | {"model_cfg": CONFIG["model_cfg"] | changes}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    shutil.copyfile(BUNDLED["planted-world"] / MERGES_FILE, folder / MERGES_FILE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        # Norms start as the identity, which would hide a forgotten gamma or beta.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ln_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / WEIGHTS_FILE,
    )
    return f"local-dir:{folder}"
