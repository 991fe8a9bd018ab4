"""The folder of a run: what was asked (config), with what (manifest), what came out (metrics).

runs/<name>/ holds config.yaml (resolved), manifest.json, metrics.json and checkpoints/; jobs add
their own files. Every file is replaced atomically: a killed run leaves the old file or the new one.
Imports no torch.
"""

import json
import logging
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from clipattr.atomic import write_text
from clipattr.config.load import to_yaml
from clipattr.config.schema import JobConfig
from clipattr.errors import ConfigError, DataError
from clipattr.redact import hide_secrets

logger = logging.getLogger(__name__)

PACKAGES = (
    "clipattr",
    "torch",
    "lightning",
    "open_clip_torch",
    "torchmetrics",
    "webdataset",
    "omegaconf",
)


BAD_SAMPLES = "bad_samples.jsonl"


class RunFolder:
    """runs/<name>/ of one job. Use `open_run`.

    In a run of several processes only the first one writes; in the others every method that
    writes does nothing, so that a job needs no rank.
    """

    def __init__(self, path: Path, started: float) -> None:
        self.path = path
        self.started = started

    @property
    def checkpoints(self) -> Path:
        """Where training states go; emptied when the config or the inputs change."""
        return self.path / "checkpoints"

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Merge nested numbers into metrics.json; later ones win, NaN and infinity become null."""
        self._merge("metrics.json", metrics)

    def update_manifest(self, **values: Any) -> None:
        """Add what is known only later, for example data=fingerprint."""
        self._merge("manifest.json", values)

    def write_bad(self, lines: Sequence[Mapping[str, str]]) -> None:
        """List the samples that were left out, in bad_samples.jsonl; no file when there is none."""
        if lines and is_first_process():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(self.path / BAD_SAMPLES, text)

    def finish(self) -> None:
        """The last thing a job does: from now on the same job with the same inputs is skipped."""
        seconds = round(time.time() - self.started, 1)
        self.update_manifest(wall_seconds=seconds, finished=True)

    def _merge(self, name: str, values: Mapping[str, Any]) -> None:
        if is_first_process():
            merged = _merge_nested(read_json(self.path / name) or {}, values)
            text = json.dumps(merged, indent=2, allow_nan=False)
            write_text(self.path / name, text + "\n")


def open_run(
    config: JobConfig, command: list[str], inputs: Any = None, outputs: Sequence[str] = ()
) -> RunFolder:
    """Create the folder, or enter it to go on.

    When the folder holds another config, or was made from other inputs, its checkpoints, metrics
    and outputs are removed, so that nothing resumes from, or is mixed with, another experiment.
    Call it when everything that the user can get wrong is known to be right.

    Args:
        config: the checked config of the job.
        command: the words of the command line, for the manifest.
        inputs: fingerprint (JSON values) of the files the job reads, as in `is_finished_with`.
        outputs: names of the files and folders the job makes in the run folder.
    """
    run = RunFolder(Path(config.runs) / config.name, started=time.time())
    if not is_first_process():
        return run
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runs={config.runs} name={config.name}: cannot be made: {error}"
        ) from None
    for leftover in run.path.glob(".*.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    is_resumed = _is_same(run.path, config, inputs)
    if not is_resumed:
        _start_over(run, outputs)
    write_text(run.path / "config.yaml", _to_text(config))
    run.update_manifest(
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        git=_read_git(),
        seed=config.seed,
        data=None,
        inputs=inputs,
        command=[hide_secrets(word) for word in command],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        resumed=is_resumed,
        wall_seconds=None,
        finished=False,
    )
    return run


def is_finished_with(config: JobConfig, inputs: Any = None, outputs: Sequence[str] = ()) -> bool:
    """Whether runs/<name>/ already holds the result of this config on these inputs."""
    path = Path(config.runs) / config.name
    manifest = read_json(path / "manifest.json") or {}
    is_there = all((path / name).exists() for name in outputs)
    return is_there and manifest.get("finished") is True and _is_same(path, config, inputs)


def is_first_process() -> bool:
    """Whether this is the process that writes; Lightning, torchrun and srun set these variables."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); delete it to run the job again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: found a {type(content).__name__}, must be a JSON object")
    return content


def _is_same(path: Path, config: JobConfig, inputs: Any) -> bool:
    stored = path / "config.yaml"
    manifest = read_json(path / "manifest.json")
    if manifest is None or not stored.exists():
        return False
    kept = stored.read_text(encoding="utf-8")
    is_same_config = _without_progress(kept) == _without_progress(_to_text(config))
    return is_same_config and manifest.get("inputs") == json.loads(json.dumps(inputs))


def _without_progress(text: str) -> str:
    """Bars decide nothing: a finished run without them is finished with them."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("  progress: "))


def _to_text(config: JobConfig) -> str:
    """The config as it is kept: a signed URL is a password, and a new signature no new run."""
    return hide_secrets(to_yaml(config))


def _start_over(run: RunFolder, outputs: Sequence[str]) -> None:
    # The manifest goes first: a kill in between must not leave a folder that counts as finished.
    # config.yaml and the new manifest are written last, so a kill before that repeats this.
    stale = ["manifest.json", "metrics.json", "config.yaml", BAD_SAMPLES]
    if any((run.path / name).exists() for name in stale) or run.checkpoints.exists():
        logger.info("%s: config or inputs changed, the run starts over", run.path)
    for path in [run.path / name for name in (*stale, *outputs)] + [run.checkpoints]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _merge_nested(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = _merge_nested(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = _null_when_not_finite(value)
    return merged


def _null_when_not_finite(value: Any) -> Any:
    """JSON has no NaN; null says that there is no number, 0 would be a wrong one."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this code comes from; null when installed."""
    is_checkout = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if is_checkout else None
    return {"commit": commit, "dirty": None if commit is None else bool(_git("status", "-s"))}


def _git(*words: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
