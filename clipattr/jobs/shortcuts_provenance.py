"""Of which images a probe, or a repaired one, was learned."""

from clipattr.config.schema import Shortcuts
from clipattr.jobs.model import embeddings_fingerprint
from clipattr.jobs.shortcut_repair import Method
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.shortcuts_learned import Learned

# Between the fingerprints of data that a probe has seen one after the other.
_AND = "+"
_EDITS: tuple[Method, ...] = ("suppress", "project")


def repaired_fingerprint(
    config: Shortcuts, audited: Audited, learned: Learned, method: Method
) -> str:
    """Of what a repaired probe was learned from.

    One that was learned again has seen the images of repair.shards alone; one that was edited has
    the old weights as well: both, joined by "+".
    """
    seen = embeddings_fingerprint(audited.clip, learned.images.samples, config.data)
    return _AND.join([audited.record.data_fingerprint, seen]) if method in _EDITS else seen


def warn_of_known_images(config: Shortcuts, audited: Audited, images: ImageSet) -> list[str]:
    """Where the probe was learned from the images that are evaluated, all of them and no others.

    Other overlaps are not seen: the file of a probe has one number for all of its images.
    """
    evaluated = embeddings_fingerprint(audited.clip, images.samples, config.data)
    if evaluated not in audited.record.data_fingerprint.split(_AND):
        return []
    return [
        f"the probe was learned from the evaluated images, data.shards={config.data.shards}: its "
        "accuracy, groups and calibration look better than they are on others"
    ]
