"""Recipes to JSON and back, and where they are found."""

import dataclasses
import functools
import importlib.util
import json
import sys
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from bilevel.recipes.augmentation_strength import AugmentationStrength
from bilevel.recipes.baseline_pp import BaselinePP
from bilevel.recipes.cavia import Cavia
from bilevel.recipes.cavia_sinusoid import CaviaSinusoid
from bilevel.recipes.distillation import Distillation
from bilevel.recipes.glyphs_to_omniglot import GlyphsToOmniglot
from bilevel.recipes.hyper_cleaning import HyperCleaning
from bilevel.recipes.imaml import Imaml
from bilevel.recipes.influence import Influence
from bilevel.recipes.layer_decay import LayerDecay
from bilevel.recipes.learned_augmentation import LearnedAugmentation
from bilevel.recipes.logistic_l2 import LogisticL2
from bilevel.recipes.maml_glyphs import MamlGlyphs
from bilevel.recipes.maml_omniglot import MamlOmniglot
from bilevel.recipes.maml_plus_plus import MamlPlusPlus
from bilevel.recipes.maml_sinusoid import MamlSinusoid
from bilevel.recipes.matching_net import MatchingNet
from bilevel.recipes.meta_curvature import MetaCurvature
from bilevel.recipes.meta_weight_net import MetaWeightNet
from bilevel.recipes.metaoptnet import MetaOptNet
from bilevel.recipes.mixture_weights import MixtureWeights
from bilevel.recipes.protonet import ProtoNet
from bilevel.recipes.r2d2 import R2D2
from bilevel.recipes.relation_net import RelationNet
from bilevel.recipes.reptile import Reptile
from bilevel.recipes.reptile_sinusoid import ReptileSinusoid
from bilevel.recipes.reweight import Reweight
from bilevel.recipes.schedules import Schedules
from bilevel.recipes.warp_grad import WarpGrad

RECIPES: dict[str, type] = {
    "maml-glyphs": MamlGlyphs,
    "maml-omniglot": MamlOmniglot,
    "maml-sinusoid": MamlSinusoid,
    "maml-plus-plus": MamlPlusPlus,
    "learned-augmentation": LearnedAugmentation,
    "reptile": Reptile,
    "reptile-sinusoid": ReptileSinusoid,
    "imaml": Imaml,
    "cavia": Cavia,
    "cavia-sinusoid": CaviaSinusoid,
    "meta-curvature": MetaCurvature,
    "warp-grad": WarpGrad,
    "protonet": ProtoNet,
    "matching-net": MatchingNet,
    "relation-net": RelationNet,
    "r2d2": R2D2,
    "metaoptnet": MetaOptNet,
    "baseline-plus-plus": BaselinePP,
    "glyphs-to-omniglot": GlyphsToOmniglot,
    "logistic-l2": LogisticL2,
    "schedules": Schedules,
    "layer-decay": LayerDecay,
    "augmentation-strength": AugmentationStrength,
    "hyper-cleaning": HyperCleaning,
    "reweight": Reweight,
    "meta-weight-net": MetaWeightNet,
    "influence": Influence,
    "distillation": Distillation,
    "mixture-weights": MixtureWeights,
}


@functools.cache
def find_recipe(name: str) -> type:
    """The recipe class of that name, or of `path/to/file.py:Name`.

    Raises:
        ValueError: when there is none of that name, or it is no recipe.
        FileNotFoundError: when the file does not exist.

    >>> find_recipe("maml-sinusoid").__name__
    'MamlSinusoid'
    """
    if name in RECIPES:
        return RECIPES[name]
    file, colon, attribute = name.rpartition(":")
    if name.rstrip(":").endswith(".py"):
        raise ValueError(f"name the recipe inside the file too: {name.rstrip(':')}:Name")
    if not colon or not file.endswith(".py"):
        raise ValueError(
            f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, "
            "and path/to/file.py:Name for one of your own"
        )
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {file} to take the recipe {attribute} from")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"{file} has no {attribute}")
    missing = [m for m in ("num_meta_steps", "seed", "build") if not hasattr(found, m)]
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)) or missing:
        raise ValueError(
            f"{name} is no recipe: it must be a frozen dataclass with num_meta_steps, seed (both with a "
            "default) and build(), see bilevel.recipes.experiment.Recipe"
        )
    return found


def to_fields(recipe: Any) -> dict[str, Any]:
    """A recipe's fields as JSON values.

    >>> to_fields(MamlSinusoid(seed=3))["seed"]
    3
    """
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def from_fields(cls: type, fields: dict[str, Any]) -> Any:
    """The recipe that `to_fields` wrote.

    Raises:
        ValueError: when a field is unknown to this version of the recipe.

    >>> from_fields(MamlSinusoid, to_fields(MamlSinusoid(seed=3))) == MamlSinusoid(seed=3)
    True
    """
    types = typing.get_type_hints(cls)
    if unknown := sorted(set(fields) - set(types)):
        raise ValueError(
            f"{cls.__name__} has no field {unknown[0]!r}: the run is of another version of the recipe"
        )
    return cls(**{name: _restore(types[name], value) for name, value in fields.items()})


def _restore(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_fields(kind, value)
    options = typing.get_args(kind) if typing.get_origin(kind) in (UnionType, typing.Union) else ()
    if value is not None and (kind is Path or Path in options):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def first_difference(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> str | None:
    """In words, the first field in which two configurations differ.

    >>> first_difference({"seed": 1}, {"seed": 2})
    'seed is 1 there and 2 here'
    """
    for name in sorted(set(a) | set(b)):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            if inner := first_difference(left, right, f"{prefix}{name}."):
                return inner
        elif left != right:
            return f"{prefix}{name} is {left} there and {right} here"
    return None
