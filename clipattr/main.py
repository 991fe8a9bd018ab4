"""The two mains: parse, validate, and only then import torch and run one job."""

import logging
import os
import sys

from clipattr.config.help import format_help
from clipattr.config.load import choose_job, load_config, read_file, split_arguments
from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS, JobConfig
from clipattr.errors import CheckpointError, ConfigError, DataError, Stopped

USER_ERROR = 2
INTERRUPTED = 130
STOPPED = 143  # what a shell reports for SIGTERM: schedulers start the job again


def train() -> None:
    """Render, or train one thing: `python train.py CONFIG.yaml [key=value ...]`."""
    sys.exit(run_script("train.py", TRAIN_JOBS, sys.argv[1:]))


def evaluate() -> None:
    """Measure trained things: `python evaluate.py CONFIG.yaml [key=value ...]`."""
    sys.exit(run_script("evaluate.py", EVALUATE_JOBS, sys.argv[1:]))


def run_script(script: str, jobs: dict[str, type[JobConfig]], arguments: list[str]) -> int:
    """The exit code of one call; what a user got wrong becomes one message, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if {"-h", "--help"} & set(arguments):
            sys.stdout.write(_format_help(script, jobs, arguments))
            return 0
        config = load_config(arguments, jobs)
        config.check_paths()
        # Before torch loads OpenMP: threads that spin while they wait made training 8 times slower
        # on a machine with other work to do; threads that sleep cost nothing that was measurable.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Huge pages for large tensors on the CPU: a step of a wide SAE spends a fifth of its time
        # on page faults otherwise. Systems without them ignore it.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        # Late on purpose: this imports torch, and a typo must die in under a second.
        from clipattr.jobs import run

        run(config, command=[script, *arguments])
    except (ConfigError, DataError, CheckpointError) as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        sys.stderr.write(f"{kind} error: {_message(error)}\n")
        return USER_ERROR
    except Stopped as error:
        sys.stderr.write(f"{error}\n")
        return STOPPED
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl+C during training into sys.exit(1).
        if not isinstance(error.__context__ or error, KeyboardInterrupt):
            raise
        sys.stderr.write("\ninterrupted: the same command starts it again\n")
        return INTERRUPTED
    return 0


def _message(error: Exception) -> str:
    """What it says; torch puts a traceback around an error of a decoding process."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rstrip().rpartition(f"{type(error).__name__}: ")[2]


def _format_help(script: str, jobs: dict[str, type[JobConfig]], arguments: list[str]) -> str:
    words = [word for word in arguments if not word.startswith("-")]
    if words:
        path, _ = split_arguments(words)
        name = choose_job(read_file(path), path, jobs)
        jobs = {name: jobs[name]}
    return format_help(script, jobs)
