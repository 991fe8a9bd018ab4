"""Write a model as an open_clip folder, which `local-dir:` loads to the same bits."""

import json
import os
import shutil
from pathlib import Path
from typing import cast

import open_clip
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import nn

from clipattr.clip.loading import Clip
from clipattr.clip.names import CONFIG_FILE, LOCAL_DIR, MERGES_FILE, WEIGHTS_FILE, resolve_name


def save_clip(clip: Clip, pretrained: str | None, folder: Path) -> None:
    """Weights, architecture, preprocessing and what the tokenizer needs; all of it or nothing.

    Args:
        clip: the model; of its weights those that it has now are written.
        pretrained: the tag or the file that it was loaded with, which its name needs.
        folder: is replaced.
    """
    resolved = resolve_name(clip.name, pretrained)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Copies: a file of safetensors has no two names for one tensor, which some text towers have.
    weights = {name: each.detach().clone() for name, each in clip.model.state_dict().items()}
    save_file({name: each.contiguous() for name, each in weights.items()}, temporary / WEIGHTS_FILE)
    config = {
        "model_cfg": open_clip.get_model_config(resolved),
        "preprocess_cfg": cast(nn.Module, clip.model.visual).preprocess_cfg,
    }
    (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    merges = Path(resolved.removeprefix(LOCAL_DIR)) / MERGES_FILE
    if resolved.startswith(LOCAL_DIR) and merges.is_file():
        shutil.copyfile(merges, temporary / MERGES_FILE)
    if isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
