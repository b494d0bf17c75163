"""What is searched, in words: `log:1e-3..1`, `int:1..10`, `conv4|resnet12`, for any field of a recipe.

    log:1e-3..1      a float, its logarithm uniform        int:1..10        a whole number
    float:0..1       a float (or lin:0..1)                 int:log:16..256  its logarithm uniform
    float:0..1:0.25  a float in steps                      int:8..64:8      in steps
    1e-3..1          what the field's type says            a|b|c            one of these

All is checked against the field's type before anything runs.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMS = "log:1e-3..1, float:0..1, int:1..10, int:log:16..256, int:8..64:8 or a|b|c"


@dataclass(frozen=True)
class Numbers:
    """A range, both ends included.

    Args:
        low: the least.
        high: the greatest.
        whole: whether only whole numbers.
        log: whether their logarithm is what is uniform.
        step: the distance of neighbours; None is any number, or 1 for whole ones.
        as_float: whether the field wants a float though the numbers are whole.
    """

    low: float
    high: float
    whole: bool = False
    log: bool = False
    step: float | None = None
    as_float: bool = False

    def value(self, drawn: Any) -> Any:
        """What the field gets for a number drawn from the range."""
        return float(drawn) if self.as_float or not self.whole else int(drawn)

    def place(self, drawn: Any) -> float:
        """Where in the range a number is: 0 is `low` and 1 is `high`."""
        scale = math.log if self.log else float
        width = scale(self.high) - scale(self.low)
        return (scale(drawn) - scale(self.low)) / width if width else 0.0

    def grid(self, points: int) -> list[float]:
        """Evenly spaced values, in the logarithm where that is what is uniform."""
        if self.step is not None or (self.whole and not self.log):
            step = self.step or 1
            count = int((self.high - self.low) / step + 1e-9) + 1
            return [self.low + step * i for i in range(count)]
        if points == 1 or self.low == self.high:
            return [self.low]
        shares = [i / (points - 1) for i in range(points)]
        if self.log:
            inner = [self.low ** (1 - share) * self.high**share for share in shares[1:-1]]
        else:
            inner = [self.low + (self.high - self.low) * share for share in shares[1:-1]]
        ends = [self.low, *inner, self.high]
        return list(dict.fromkeys(round(value) for value in ends)) if self.whole else ends


@dataclass(frozen=True)
class Choices:
    """One of several values.

    Args:
        texts: as they were written.
        values: what the field gets.
    """

    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def drawn(self) -> tuple[Any, ...]:
        """What a sampler draws from: the values, or their texts where a storage cannot hold them."""
        plain = all(isinstance(value, str | int | float | None) for value in self.values)
        return self.values if plain else self.texts

    def value(self, drawn: Any) -> Any:
        """What the field gets for what was drawn."""
        return self.values[self.drawn.index(drawn)]


Space = dict[str, Numbers | Choices]


def parse_space(recipe: Any, specs: Mapping[str, str]) -> Space:
    """A search space from its texts, checked against a recipe.

    Args:
        recipe: an instance of a recipe.
        specs: a text for each field, which may be dotted, with dashes or underscores.

    Raises:
        ValueError: for a field that the recipe lacks or that is no single value, a text of no known form, an
            empty range, a logarithm of what is not positive, a kind that is not the field's.

    >>> from bilevel.recipes.maml_sinusoid import MamlSinusoid
    >>> space = parse_space(MamlSinusoid(), {"shots": "int:1..10"})
    >>> space["shots"].low, space["shots"].high
    (1, 10)
    """
    space: Space = {}
    for written, text in specs.items():
        name = written.replace("-", "_")
        if name in space:
            raise ValueError(f"--space.{written} is given twice; leave one out")
        try:
            space[name] = _parse(_field_type(recipe, name), text.strip())
        except ValueError as error:
            raise ValueError(f"--space.{written} {text}: {error}") from None
    return space


def apply_values(recipe: Any, values: Mapping[str, Any]) -> Any:
    """The recipe with some of its fields, dotted names, at other values.

    >>> from bilevel.recipes.maml_sinusoid import MamlSinusoid
    >>> apply_values(MamlSinusoid(), {"shots": 3, "loop.chunk_size": 7}).loop.chunk_size
    7
    """
    heads: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            heads[head] = apply_values(heads.get(head, getattr(recipe, head)), {rest: value})
        else:
            heads[head] = value
    return dataclasses.replace(recipe, **heads)


def drawn_values(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields get for what a sampler drew."""
    return {name: space[name].value(drawn) for name, drawn in params.items()}


def distance(space: Space, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How far apart two points are, each range scaled to 0..1; another choice is 1 away.

    >>> from bilevel.recipes.maml_sinusoid import MamlSinusoid
    >>> space = parse_space(MamlSinusoid(), {"shots": "int:1..11"})
    >>> distance(space, {"shots": 1}, {"shots": 6})
    0.5
    """
    total = 0.0
    for name, kind in space.items():
        if isinstance(kind, Numbers):
            total += (kind.place(a[name]) - kind.place(b[name])) ** 2
        else:
            total += float(a[name] != b[name])
    return math.sqrt(total)


def field_names(recipe: Any, prefix: str = "") -> list[str]:
    """All fields of a recipe that are single values, dotted."""
    names = []
    for each in dataclasses.fields(recipe):
        value = getattr(recipe, each.name)
        if dataclasses.is_dataclass(value):
            names += field_names(value, f"{prefix}{each.name}.")
        else:
            names.append(prefix + each.name)
    return names


def _field_type(recipe: Any, name: str) -> Any:
    """The annotation of a dotted field."""
    owner, parts = recipe, name.split(".")
    for i, part in enumerate(parts):
        if not dataclasses.is_dataclass(owner) or part not in {f.name for f in dataclasses.fields(owner)}:
            raise ValueError(_unknown(recipe, name))
        hint = typing.get_type_hints(type(owner))[part]
        owner = getattr(owner, part)
        if i == len(parts) - 1:
            break
    if dataclasses.is_dataclass(owner):
        raise ValueError(
            f"{name} is a group of fields; search one of {', '.join(field_names(owner, name + '.'))}"
        )
    return hint


def _unknown(recipe: Any, name: str) -> str:
    names = field_names(recipe)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    near = near or [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    return f"{type(recipe).__name__} has no field {name}; {hint}"


def _parse(hint: Any, text: str) -> Numbers | Choices:
    kinds = _alternatives(hint)
    if ".." in text and "|" not in text:
        return _numbers(kinds, text)
    if text.partition(":")[0] in ("log", "lin", "float", "int") and "|" not in text:
        raise ValueError(f"a range is written low..high, like {_FORMS}")
    texts = tuple(part.strip() for part in text.split("|"))
    if len(texts) < 2:
        raise ValueError(f"one value is nothing to search; write {_FORMS}")
    if len(set(texts)) < len(texts):
        raise ValueError("a choice is named twice; leave one out")
    return Choices(texts, tuple(_typed(kinds, part) for part in texts))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have; the members of a Literal count as one type."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return tuple(part for each in typing.get_args(hint) for part in _alternatives(each)) if union else (hint,)


def _numbers(kinds: tuple[Any, ...], text: str) -> Numbers:
    *words, span = [part.strip() for part in text.split(":")]
    step = None
    if ".." not in span:  # what stands last is a step
        step, span = _number(span), words.pop()
    low, high = (_number(part) for part in _ends(span))
    known = {(): float if int not in kinds else int, ("log",): float, ("float",): float, ("lin",): float}
    known |= {("int",): int, ("int", "log"): int, ("float", "log"): float}
    if tuple(words) not in known:
        raise ValueError(f"no kind {':'.join(words)}; write {_FORMS}")
    whole, log = known[tuple(words)] is int, "log" in words
    if float not in kinds and not (whole and int in kinds):
        if int in kinds:
            raise ValueError("the field holds whole numbers; write int:1..10 or int:log:16..256")
        raise ValueError(f"the field is no number but {_said(kinds)}; write a|b|c")
    if not low < high:
        raise ValueError(f"the range is empty: {low:g} is not below {high:g}")
    if log and low <= 0:
        raise ValueError(f"the logarithm of {low:g} does not exist; begin above 0, or use float: or int:")
    if step is not None and (log or not 0 < step <= high - low):
        raise ValueError("a step must be above 0, within the range, and of a range that is not log:")
    if whole and any(value != int(value) for value in (low, high, step or 0)):
        raise ValueError("int: takes whole numbers")
    if step:  # the greatest that the steps reach
        high = low + step * int((high - low) / step + 1e-9)
    as_float = whole and int not in kinds
    if whole:
        return Numbers(int(low), int(high), True, log, int(step) if step else None, as_float)
    return Numbers(low, high, False, log, step)


def _ends(span: str) -> list[str]:
    ends = span.split("..")
    if len(ends) != 2 or not all(ends):
        raise ValueError(f"a range has two ends, got {span}; write {_FORMS}")
    return ends


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number; write {_FORMS}") from None
    if not math.isfinite(value):
        raise ValueError(f"a range needs finite ends, got {text}")
    return value


def _typed(kinds: tuple[Any, ...], text: str) -> Any:
    """A choice as the field's type; a plain text fits only where nothing stricter does."""
    for kind in sorted(kinds, key=lambda kind: kind is str):
        found, value = _as_kind(kind, text)
        if found:
            return value
    raise ValueError(f"{text!r} is not {_said(kinds)}")


def _as_kind(kind: Any, text: str) -> tuple[bool, Any]:
    """Whether a text is of a type, and the value it then is."""
    if typing.get_origin(kind) is typing.Literal:
        members = {str(member): member for member in typing.get_args(kind)}
        return text in members, members.get(text)
    if kind in (None, type(None)):
        return text.lower() == "none", None
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        return text.lower() in words, words.get(text.lower())
    if typing.get_origin(kind) is tuple:
        inner = [each for each in typing.get_args(kind) if each is not Ellipsis][:1] or [str]
        parts = [_as_kind(inner[0], part.strip()) for part in text.split(",") if part.strip()]
        return all(found for found, _ in parts), tuple(value for _, value in parts)
    if kind in (int, float, str, Path):
        try:
            return True, kind(text)
        except ValueError:
            return False, None
    return False, None


def _said(kinds: tuple[Any, ...]) -> str:
    """The types of a field, for a message."""
    words = []
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            words += [str(member) for member in typing.get_args(kind)]
        else:
            words.append("none" if kind in (None, type(None)) else getattr(kind, "__name__", str(kind)))
    return " or ".join(words)
