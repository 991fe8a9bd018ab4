"""The frozen CLIP model: load any open_clip tower, cut it at a site, embed prompts."""

from clipattr.clip.attention import HeadMaps
from clipattr.clip.cut import Cut, LastLayer, Rest, State
from clipattr.clip.heads import TextHead, embed_prompts, prompt_head, text_head
from clipattr.clip.loading import Clip, build_clip, load_clip
from clipattr.clip.site import STREAMS, TOKENS, Site
from clipattr.clip.templates import load_class_names, load_templates
from clipattr.clip.tower import Tower, image_tower, text_tower

__all__ = [
    "STREAMS",
    "TOKENS",
    "Clip",
    "Cut",
    "HeadMaps",
    "LastLayer",
    "Rest",
    "Site",
    "State",
    "TextHead",
    "Tower",
    "build_clip",
    "embed_prompts",
    "image_tower",
    "load_class_names",
    "load_clip",
    "load_templates",
    "prompt_head",
    "text_head",
    "text_tower",
]
