"""Task distributions: every one is a sampler, `sample(key) -> Task`, that runs on the device."""

from bilevel.tasks import augment
from bilevel.tasks.convert import Layout, convert
from bilevel.tasks.corrupt import Corrupted, flip_noise, imbalanced_pair, long_tailed, uniform_noise
from bilevel.tasks.episodes import EqualShots, MetaDatasetShots, UnequalShots, VaryingFewShot
from bilevel.tasks.few_beside_many import FewBesideMany, few_beside_many
from bilevel.tasks.few_shot import FewShot
from bilevel.tasks.fixed import Fixed
from bilevel.tasks.gaussian_process import GaussianProcess
from bilevel.tasks.glyphs import Glyphs, glyph
from bilevel.tasks.harmonics import harmonics
from bilevel.tasks.hold_out import hold_out
from bilevel.tasks.image_completion import ImageCompletion
from bilevel.tasks.minibatch import Minibatch
from bilevel.tasks.mnist import Mnist, mnist
from bilevel.tasks.newsgroups import newsgroups
from bilevel.tasks.omniglot import omniglot
from bilevel.tasks.prefetch import HostFewShot, HostTasks, hosted
from bilevel.tasks.rows import Rows
from bilevel.tasks.sampling import batch, choose, classification
from bilevel.tasks.sinusoid import sinusoid
from bilevel.tasks.stored import load, open_stored, stored
from bilevel.tasks.tabular import Tabular, divide, tabular
from bilevel.tasks.task_augment import (
    augmented,
    changed,
    metamix,
    mislabeled,
    mixed_classes,
    relabeled,
    shifted_targets,
)
from bilevel.tasks.text_sources import TextSources, read_sources, small_languages
from bilevel.tasks.with_support import with_support

__all__ = [
    "Corrupted",
    "EqualShots",
    "FewBesideMany",
    "FewShot",
    "Fixed",
    "GaussianProcess",
    "Glyphs",
    "HostFewShot",
    "HostTasks",
    "ImageCompletion",
    "Layout",
    "MetaDatasetShots",
    "Minibatch",
    "Mnist",
    "Rows",
    "Tabular",
    "TextSources",
    "UnequalShots",
    "VaryingFewShot",
    "augment",
    "augmented",
    "batch",
    "changed",
    "choose",
    "classification",
    "convert",
    "divide",
    "few_beside_many",
    "flip_noise",
    "glyph",
    "harmonics",
    "hold_out",
    "hosted",
    "imbalanced_pair",
    "load",
    "long_tailed",
    "metamix",
    "mislabeled",
    "mixed_classes",
    "mnist",
    "newsgroups",
    "omniglot",
    "open_stored",
    "read_sources",
    "relabeled",
    "shifted_targets",
    "sinusoid",
    "small_languages",
    "stored",
    "tabular",
    "uniform_noise",
    "with_support",
]
