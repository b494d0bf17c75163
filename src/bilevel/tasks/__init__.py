"""Task distributions: every one is a sampler, `sample(key) -> Task`, that runs on the device."""

from bilevel.tasks.few_shot import FewShot
from bilevel.tasks.glyphs import Glyphs, glyph
from bilevel.tasks.omniglot import omniglot
from bilevel.tasks.sampling import batch, choose, classification
from bilevel.tasks.sinusoid import sinusoid

__all__ = [
    "FewShot",
    "Glyphs",
    "batch",
    "choose",
    "classification",
    "glyph",
    "omniglot",
    "sinusoid",
]
