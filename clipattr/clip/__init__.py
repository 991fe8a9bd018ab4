"""The frozen CLIP model: load any open_clip tower, cut it at a site, embed prompts."""

from clipattr.clip.loading import Clip, build_clip, load_clip
from clipattr.clip.site import Site
from clipattr.clip.text import embed_prompts
from clipattr.clip.tower import LastLayer, Tower

__all__ = ["Clip", "LastLayer", "Site", "Tower", "build_clip", "embed_prompts", "load_clip"]
