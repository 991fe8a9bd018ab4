"""The page that the hub shows of an SAE: what it is, of which model, how good, how to use it."""

import re
import string
from collections.abc import Mapping
from typing import Any

import yaml

# A README with this line was written here, and may be written again.
MARK = "<!-- written by clipattr.sae.push_sae, which replaces it while this line is here -->"
HUB_MODEL = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)", re.ASCII)
# Markdown takes a backslash before any of these for the character itself.
_SPECIAL = re.compile("[" + re.escape("".join(set(string.punctuation) - set(",.-+=()"))) + "]")


def model_card(
    description: Mapping[str, Any], *, repo_id: str, subfolder: str = "", license: str | None = None
) -> str:
    """README.md from the content of sae.json, of which nothing is taken for markup."""
    name = description["model"]["name"]
    base = HUB_MODEL.fullmatch(name)
    matter = {
        "library_name": "clipattr",
        "tags": ["clip", "interpretability", "sparse-autoencoder"],
        **({"license": license} if license else {}),
        **({"base_model": base[1]} if base else {}),
    }
    target = description.get("target_site") or {}
    rows = {
        "architecture": description["architecture"],
        **description["settings"],
        "normalisation": description["normalisation"],
        **{f"site: {key}": value for key, value in description["site"].items()},
        **{f"target site: {key}": value for key, value in target.items()},
        "model": name,
        "sha256 of the model's weights": description["model"]["weights_sha256"],
        "fingerprint of the data": description["data_fingerprint"],
    }
    where = f", subfolder={subfolder!r}" if subfolder else ""
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False).strip()}\n---\n{MARK}",
        f"# A sparse autoencoder of {_escape(name)}",
        _table("setting", rows),
        *([_table("metric", description["metrics"])] if description["metrics"] else []),
        "```python\n"
        "from clipattr.sae import load_sae, pull_sae\n"
        f"sae, record = load_sae(pull_sae({repo_id!r}{where}))\n"
        "codes = sae.encode(x)  # activations x [rows, d_model] at the site above\n"
        "```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(name: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {_escape(key)} | {_escape(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {name} | value |", "|---|---|", *lines])


def _escape(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))
