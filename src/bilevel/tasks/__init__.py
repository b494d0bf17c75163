"""Task distributions: every one is a sampler, `sample(key) -> Task`, that runs on the device."""

from bilevel.tasks.convert import Layout, convert
from bilevel.tasks.few_shot import FewShot
from bilevel.tasks.glyphs import Glyphs, glyph
from bilevel.tasks.omniglot import omniglot
from bilevel.tasks.prefetch import HostFewShot, HostTasks, hosted
from bilevel.tasks.sampling import batch, choose, classification
from bilevel.tasks.sinusoid import sinusoid
from bilevel.tasks.stored import load, open_stored, stored

__all__ = [
    "FewShot",
    "Glyphs",
    "HostFewShot",
    "HostTasks",
    "Layout",
    "batch",
    "choose",
    "classification",
    "convert",
    "glyph",
    "hosted",
    "load",
    "omniglot",
    "open_stored",
    "sinusoid",
    "stored",
]
