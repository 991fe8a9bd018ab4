"""YAML file + key=value words -> one checked dataclass.

Every value is compared with the schema before OmegaConf merges it, because OmegaConf converts where
a user wants to be told: `name: no` becomes 'False', `sae.lr=.nan` a learning rate. Nothing in a
config is executed or read from the environment: `${...}` is refused.
"""

import math
from dataclasses import fields, is_dataclass
from enum import EnumType
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipattr.config.fields import describe, format_value, suggest
from clipattr.config.schema import JOBS, TRAIN_JOBS, JobConfig
from clipattr.errors import ConfigError

COMMAND_LINE = "on the command line"


def load_config(arguments: list[str], jobs: dict[str, type[JobConfig]]) -> JobConfig:
    """The checked config of one job.

    Later words win: defaults of the schema, then the file, then the overrides in their order.

    Args:
        arguments: the words after the script's name, one YAML file and any number of key=value.
        jobs: the jobs that this script runs.

    Raises:
        ConfigError: naming the key, what was found, where, and what is allowed.
    """
    OmegaConf.clear_resolver("oc.env")
    path, overrides = split_arguments(arguments)
    values = read_file(path)
    job = jobs[choose_job(values, path, jobs)]
    merged = OmegaConf.structured(job)
    layers = [(values, f"in {path}")]
    layers += [(layer, COMMAND_LINE) for layer in _read_overrides(job, overrides)]
    for layer, where in layers:
        _check_section(job, layer, where, prefix="")
        merged = OmegaConf.merge(merged, _convert(job, layer))
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: required and not set. Write it in {path} or add "
            f"{missing[0]}=VALUE"
        )
    config = cast("JobConfig", OmegaConf.to_object(merged))
    config.check()
    return config


def to_yaml(config: JobConfig) -> str:
    """The resolved config as YAML text; loading it gives an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """The config file and the overrides among the words of the command line."""
    overrides = [word for word in arguments if "=" in word]
    paths = [word for word in arguments if "=" not in word]
    for word in arguments:
        if word.startswith("-"):
            fixed = word.lstrip("-")
            fixed = fixed if "=" in fixed else f"{fixed}=VALUE"
            raise ConfigError(f"{word}: not an option. Write {fixed}; the only option is --help")
    for word in paths:
        if not word.endswith((".yaml", ".yml")):
            raise ConfigError(
                f"{word}: neither a .yaml file nor an override. An override is {word}=VALUE"
            )
    if len(paths) != 1:
        found = f"found {len(paths)} ({', '.join(paths)})" if paths else "found none"
        raise ConfigError(
            f"exactly one .yaml file is needed, {found}. "
            "Usage: CONFIG.yaml [key=value ...]; --help lists all keys"
        )
    return paths[0], overrides


def choose_job(values: dict, path: str, jobs: dict[str, type[JobConfig]]) -> str:
    """The job named in the file, when this script runs it."""
    name = str(values.get("job"))
    if name in jobs:
        return name
    if name in JOBS:
        script = "train.py" if name in TRAIN_JOBS else "evaluate.py"
        raise ConfigError(f"job={name} in {path}: this job is run by {script}")
    found = f"job={name} in {path}: unknown job." if "job" in values else f"{path}: has no job."
    raise ConfigError(
        f"{found}{suggest(name, jobs)} The file opens with 'job: NAME'"
        f"\njobs of this script: {', '.join(jobs)}"
    )


def read_file(path: str) -> dict:
    """The raw values of a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_list_neighbours(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    try:
        values = _parse(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a plain YAML mapping: {reason}{_NO_REFERENCES}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found a {type(values).__name__}; must be a mapping, key: value")
    return values


def _parse(text: str) -> Any:
    """YAML in OmegaConf's dialect: 1e-4 is a number, a repeated key is an error."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


_NO_REFERENCES = " (references such as ${...} are not read: write the value itself)"


def _list_neighbours(path: Path) -> str:
    found = sorted(str(other) for other in path.parent.glob("[!.]*.yaml"))[:8]
    return f".{suggest(str(path), found)}\nthere are: {', '.join(found)}" if found else ""


def _read_overrides(job: type[JobConfig], words: list[str]) -> list[dict]:
    keys = [word.partition("=")[0] for word in words]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(
                f"{key} {COMMAND_LINE}: given {keys.count(key)} times. Quote a value that has "
                "braces or spaces: the shell splits it"
            )
    return [_read_override(job, word) for word in words]


def _read_override(job: type[JobConfig], word: str) -> dict:
    """section.key=value as a nested mapping."""
    key, _, text = word.partition("=")
    if not key or text in ("", MISSING):
        raise ConfigError(f"{word} {COMMAND_LINE}: write KEY=VALUE (KEY=null for no value)")
    if key == "job":
        raise ConfigError(f"{word} {COMMAND_LINE}: the job is chosen by the YAML file alone")
    is_text = _find_annotation(job, key) in (str, str | None)
    try:
        value = _parse(f"value: {text}")["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        value = text
        if not is_text and "${" not in text:
            raise ConfigError(f"{word} {COMMAND_LINE}: not a YAML value") from None
    if is_text and value is not None and not isinstance(value, str):
        value = text  # name=012 is a name and not the octal number 10
    *sections, last = key.split(".")
    values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def _find_annotation(section: Any, key: str) -> Any:
    """The type of a dotted key, or None when there is no such key."""
    for part in key.split("."):
        owner = _find_section(section)
        section = get_type_hints(owner).get(part) if owner else None
    return section


def _find_section(annotation: Any) -> Any:
    """The dataclass of a section, which may also be null; None for anything else."""
    return next((option for option in _options(annotation) if is_dataclass(option)), None)


def _check_section(section: Any, values: dict, where: str, prefix: str) -> None:
    hints = get_type_hints(section)
    allowed = [entry.name for entry in fields(section)]
    for key, value in values.items():
        if key not in allowed:
            hint = suggest(f"{prefix}{key}", [prefix + name for name in allowed])
            owner = prefix.rstrip(".") or "this job"
            raise ConfigError(
                f"{prefix}{key} {where}: unknown key.{hint}\nkeys of {owner}: {', '.join(allowed)}"
            )
        _check_value(hints[key], value, where, f"{prefix}{key}")


def _check_value(annotation: Any, value: Any, where: str, name: str) -> None:
    section = _find_section(annotation)
    if section and isinstance(value, dict):
        _check_section(section, value, where, f"{name}.")
    elif is_dataclass(annotation):
        raise ConfigError(f"{name}={format_value(value)} {where}: must be {describe(annotation)}")
    elif isinstance(value, list) and (lists := _list_options(annotation)):
        for position, item in enumerate(value):
            _check_value(get_args(lists[0])[0], item, where, f"{name}[{position}]")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{name}={value!r} {where}: must be a value{_NO_REFERENCES}")
    elif value != MISSING and not _is_allowed(annotation, value):
        words = [word for one in _options(annotation) for word in getattr(one, "__members__", [])]
        hint = suggest(str(value), words)
        quote = "; put it in quotes" if annotation is str and not isinstance(value, list) else ""
        raise ConfigError(
            f"{name}={format_value(value)} {where}: must be {describe(annotation)}{quote}.{hint}"
        )


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _list_options(annotation: Any) -> list[Any]:
    return [option for option in _options(annotation) if get_origin(option) is list]


def _convert(section: Any, values: dict) -> dict:
    """Words as choices, and 1 as 1.0: OmegaConf does not, where a value or a list is allowed."""
    hints = get_type_hints(section)
    return {key: _convert_value(hints[key], value) for key, value in values.items()}


def _convert_value(annotation: Any, value: Any) -> Any:
    if isinstance(value, dict):
        section = _find_section(annotation)
        return _convert(section, value) if section else value
    if isinstance(value, list):
        item = get_args(_list_options(annotation)[0])[0]
        return [_convert_value(item, one) for one in value]
    for option in _options(annotation):
        if isinstance(option, EnumType) and value in option.__members__:
            return option[value]
        if option is float and type(value) is int:
            return float(value)
    return value


def _is_allowed(annotation: Any, value: Any) -> bool:
    options = _options(annotation)
    if len(options) > 1:
        return any(_is_allowed(option, value) for option in options)
    if isinstance(annotation, EnumType):
        return isinstance(value, str) and value in annotation.__members__
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return annotation in (str, bool, NoneType) and isinstance(value, annotation)
