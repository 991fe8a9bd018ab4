"""The text of `--help`: jobs and fields, read from the schema and never written twice."""

import inspect

from clipattr.config.fields import Field, list_fields
from clipattr.config.schema import JobConfig

USAGE = """\
usage: python {script} CONFIG.yaml [key=value ...]
       python {script} [CONFIG.yaml] --help      with a file: the fields of its job alone

The first line of the YAML file, `job: <name>`, chooses the job. A file holds only what differs from
the defaults below; key=value wins over the file, for example trainer.devices=2
"""


def format_help(script: str, jobs: dict[str, type[JobConfig]]) -> str:
    """Usage, the jobs with one line each, and every field: name, type, default, doc."""
    lines = [USAGE.format(script=script), "jobs:"]
    width = max(map(len, jobs)) + 2
    for name, job in jobs.items():
        lines.append(f"  {name:<{width}}{summarise(job)}")
    users: dict[Field, list[str]] = {}
    for name, job in jobs.items():
        for field in list_fields(job()):
            users.setdefault(field, []).append(name)
    # Fields that several jobs share are printed once, under the names of those jobs.
    groups: dict[str, list[Field]] = {}
    for field, owners in users.items():
        groups.setdefault("every job" if owners == [*jobs] else ", ".join(owners), []).append(field)
    for owners, group in groups.items():
        lines.append(f"\nfields of {owners}:")
        for field in group:
            lines += [f"  {field.name}: {field.allowed} = {field.default}", f"      {field.doc}"]
    return "\n".join(lines) + "\n"


def summarise(job: type[JobConfig]) -> str:
    """The first docstring line of a job, without its name."""
    return inspect.cleandoc(job.__doc__ or "").split("\n")[0].partition(": ")[2]
