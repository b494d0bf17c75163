"""Complete runnable experiments, one file each: the only place where all parts meet."""

from bilevel.recipes.config import RECIPES, find_recipe
from bilevel.recipes.experiment import Experiment, Recipe
from bilevel.recipes.maml_glyphs import MamlGlyphs
from bilevel.recipes.maml_omniglot import MamlOmniglot
from bilevel.recipes.maml_sinusoid import MamlSinusoid

__all__ = [
    "RECIPES",
    "Experiment",
    "MamlGlyphs",
    "MamlOmniglot",
    "MamlSinusoid",
    "Recipe",
    "find_recipe",
]
