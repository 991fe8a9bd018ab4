"""Checks of the schema: each raises a ConfigError that names the field."""

from clipattr.errors import ConfigError


def check_positive(section: object, prefix: str, *names: str) -> None:
    """Every named field is greater than 0."""
    for name in names:
        value = getattr(section, name)
        if value <= 0:
            raise ConfigError(f"{prefix}.{name}={value!r}: must be greater than 0")


def check_not_negative(section: object, prefix: str, *names: str) -> None:
    """Every named field is 0 or greater."""
    for name in names:
        value = getattr(section, name)
        if value < 0:
            raise ConfigError(f"{prefix}.{name}={value!r}: must be 0 or greater")


def check_divides(batch_size: int, name: str, devices: int) -> None:
    """A batch falls into equal shares."""
    if batch_size % devices:
        raise ConfigError(
            f"{name}={batch_size} does not divide by trainer.devices={devices}: every device takes "
            "the same share of a batch"
        )


def check_label(prefix: str, label: str) -> None:
    """A label names the field of a sample that holds the class."""
    if label != "cls" and not label.startswith("json:"):
        raise ConfigError(f"{prefix}.label={label!r}: must be cls or json:<key>")
