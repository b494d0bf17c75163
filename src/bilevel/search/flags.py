"""Flags as words: the search space among them, tyro's parser, and a recipe back as flags."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

_SPACE = "--space."


def split_space(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The `--space.FIELD SPEC` among some words, and the other words.

    Raises:
        ValueError: when a field has no text, or is given twice.

    >>> split_space(["--space.rate", "log:1e-3..1", "--seed", "3"])
    ({'rate': 'log:1e-3..1'}, ['--seed', '3'])
    """
    space, rest = {}, []
    left = iter(words)
    for word in left:
        if not word.startswith(_SPACE):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix(_SPACE).partition("=")
        text = text if equals else next(left, "")
        if not name or not text or text.startswith("--"):
            raise ValueError(f"{word} needs what to search, like {_SPACE}{name or 'seed'} int:1..10")
        if name.replace("-", "_") in space:
            raise ValueError(f"{_SPACE}{name} is given twice; leave one out")
        space[name.replace("-", "_")] = text
    return space, rest


def value_of(words: Sequence[str], name: str) -> str | None:
    """A flag's value before the flags are parsed, as `--name value` or `--name=value`."""
    for i, word in enumerate(words):
        if word == name and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def parse(prog: str, cls: Any, words: Sequence[str], description: str | None) -> Any:
    """tyro's parser, with its boxed complaints made one line.

    Raises:
        ValueError: with what is wrong with the flags.
        SystemExit: when help was asked for, and printed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, prog=prog, args=list(words), description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
    reason = itertools.takewhile(lambda line: line and line.strip("─╯╰"), lines)
    raise ValueError(f"{' '.join(reason) or 'wrong flags'}; `{prog} --help` lists the flags") from None


def to_flags(recipe: Any, default: Any, prefix: str = "--") -> list[str]:
    """The flags that make the recipe from its defaults.

    >>> from bilevel.recipes.maml_sinusoid import MamlSinusoid
    >>> to_flags(MamlSinusoid(seed=3), MamlSinusoid())
    ['--seed', '3']
    """
    words = []
    for each in dataclasses.fields(recipe):
        value, usual = getattr(recipe, each.name), getattr(default, each.name)
        name = each.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and type(value) is type(usual):
            words += to_flags(value, usual, f"{prefix}{name}.")
        elif value != usual:
            if isinstance(value, bool):
                words.append(f"{prefix}{'' if value else 'no-'}{name}")
            else:
                several = value if isinstance(value, tuple | list) else (value,)
                words += [prefix + name, *map(str, several)]
    return words


def absolute(name: str) -> str:
    """A recipe's name, the same from every working folder."""
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if colon else name
