"""Text of several sources and of one target, as windows of tokens for a small language model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Nouns and verbs in the singular, so that any of them go together.
_NOUNS = ("cat", "dog", "bird", "child", "farmer", "river", "tree", "stone", "boat", "cloud", "king", "horse")
_ADJECTIVES = ("old", "small", "quiet", "green", "happy", "strange", "heavy", "young", "bright", "cold")
_VERBS = ("sees", "finds", "follows", "likes", "carries", "watches", "leaves", "meets", "paints", "hears")
_PLACES = ("at home", "in town", "by the sea", "under the bridge", "after dark", "in the morning")
_BRACKETS = {"(": ")", "[": "]", "<": ">"}
_ROTATED = str.maketrans("abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm")
_QUERY_SHARE = 0.5  # of the target's text; the rest is the test


class TextSources(NamedTuple):
    """Windows of the sources, and of the target in two parts without a common character.

    Args:
        names: of the S sources.
        support: int32 `[S, N, length + 1]`; inputs are all but the last token of a window, targets all but
            the first.
        query: int32 `[1, M, length + 1]`, the target's text that the mixture is chosen by.
        test: the same of the rest of the target's text.
        alphabet: the byte that each token stands for.
    """

    names: tuple[str, ...]
    support: np.ndarray
    query: np.ndarray
    test: np.ndarray
    alphabet: bytes


def small_languages(length: int = 32, characters: int = 20_000, seed: int = 0) -> TextSources:
    """Six languages made by a program, and a target of which two of them are the parts.

    "words" are English sentences of a small grammar, "sums" lines like 12+7=19. The target mixes their lines,
    seven of ten sentences. The others are of no use to it: "brackets" that close in order, "foreign", the
    grammar in a rotated alphabet, "shuffled", lines of the target with their characters in random order,
    and "noise". So the best mixture is known in part: all weight on the first two. A model that has learned
    no more than how often letters come gains from "shuffled" too, which shows when an inner loop is short.

    Args:
        length: tokens of a window.
        characters: of each source; the target has a fifth of that as query, and as much as test.
        seed: all of it follows from it.

    Raises:
        ValueError: when there are not enough characters for a window.

    >>> found = small_languages(length=16, characters=1000)
    >>> found.names, found.support.shape
    (('words', 'sums', 'brackets', 'foreign', 'shuffled', 'noise'), (6, 58, 17))
    """
    rng = np.random.default_rng(seed)

    def mixed(rng):
        return _words(rng) if rng.random() < 0.7 else _sums(rng)

    texts = {
        "words": _text(_words, rng, characters),
        "sums": _text(_sums, rng, characters),
        "brackets": _text(_brackets, rng, characters),
        "foreign": _text(lambda rng: _words(rng).translate(_ROTATED), rng, characters),
        "shuffled": _text(lambda rng: "".join(rng.permutation(list(mixed(rng)))), rng, characters),
    }
    target = _text(mixed, rng, 2 * characters // 5)
    letters = sorted(set(target).union(*texts.values()))
    texts["noise"] = "".join(rng.choice(letters, characters))
    return windows({name: text.encode() for name, text in texts.items()}, target.encode(), length)


def read_sources(sources: Path, target: Path, length: int = 64) -> TextSources:
    """Your own text: one file or folder a source inside a folder, and a file or folder for the target.

    A folder stands for all files inside it, in the order of their names. Bytes are the tokens.

    Args:
        sources: a folder with at least two entries, each of which is a source by its name.
        target: text of what the model is for; half of it is the query, half the test.
        length: tokens of a window.

    Raises:
        FileNotFoundError: when there is no such folder or target.
        ValueError: for fewer than two sources, two of one name, or one that is shorter than a window.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("sources/a.txt", "sources/b.txt", "target.txt"):
    ...     (folder / name).parent.mkdir(exist_ok=True)
    ...     _ = (folder / name).write_text(name * 20)
    >>> read_sources(folder / "sources", folder / "target.txt", length=8).names
    ('a', 'b')
    """
    if not sources.is_dir():
        raise FileNotFoundError(f"{sources} is no folder; make one with a file or a folder for each source")
    if not target.exists():
        raise FileNotFoundError(f"there is no target {target}; name a file or a folder of text")
    entries = sorted(path for path in sources.iterdir() if not path.name.startswith("."))
    if len(entries) < 2:
        raise ValueError(f"a mixture needs at least two sources, got {len(entries)} in {sources}")
    named: dict[str, Path] = {}
    for path in entries:
        name = path.name if path.is_dir() else path.stem
        if name in named:
            raise ValueError(
                f"{named[name]} and {path} would both be the source {name!r}; rename one of them"
            )
        named[name] = path
    return windows({name: _read(path) for name, path in named.items()}, _read(target), length)


def windows(sources: Mapping[str, bytes], target: bytes, length: int) -> TextSources:
    """Cut texts into windows of `length` + 1 tokens; shorter sources are repeated to one number.

    Args:
        sources: the text of each.
        target: its first half becomes the query, the rest the test.
        length: tokens that a window predicts.

    Raises:
        ValueError: when a text is shorter than a window, or the length is below 1.

    >>> windows({"a": b"abcabc", "b": b"ab"}, b"abcabc", 1).support[1].tolist()
    [[0, 1], [0, 1], [0, 1]]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    half = int(_QUERY_SHARE * len(target))
    parts = {**sources, "the target's first half": target[:half], "the target's second half": target[half:]}
    for name, text in parts.items():
        if len(text) <= length:
            raise ValueError(
                f"{name} has {len(text)} bytes, fewer than a window of {length + 1}; add text, or shorten it"
            )
    alphabet = bytes(sorted(set(b"".join(parts.values()))))
    codes = np.zeros(256, np.int32)
    codes[list(alphabet)] = np.arange(len(alphabet))

    def cut(text):
        count = len(text) // (length + 1)
        tokens = codes[np.frombuffer(text, np.uint8)[: count * (length + 1)]]
        return tokens.reshape(count, length + 1)

    cuts = [cut(text) for text in sources.values()]
    most = max(len(rows) for rows in cuts)
    support = np.stack([rows[np.arange(most) % len(rows)] for rows in cuts])
    return TextSources(tuple(sources), support, cut(target[:half])[None], cut(target[half:])[None], alphabet)


def _read(path: Path) -> bytes:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return b"\n".join(file.read_bytes() for file in files)


def _text(line: Callable[[np.random.Generator], str], rng: np.random.Generator, characters: int) -> str:
    lines, total = [], 0
    while total < characters:
        lines.append(line(rng) + "\n")
        total += len(lines[-1])
    return "".join(lines)[:characters]


def _words(rng: np.random.Generator) -> str:
    def thing():
        kind = f"{rng.choice(_ADJECTIVES)} " if rng.random() < 0.5 else ""
        return f"the {kind}{rng.choice(_NOUNS)}"

    place = f" {rng.choice(_PLACES)}" if rng.random() < 0.4 else ""
    return f"{thing()} {rng.choice(_VERBS)} {thing()}{place}."


def _sums(rng: np.random.Generator) -> str:
    a, b = rng.integers(0, 50, 2)
    return f"{a}+{b}={a + b}"


def _brackets(rng: np.random.Generator) -> str:
    line, still_open = "", []
    for _ in range(24):
        if still_open and rng.random() < 0.5:
            line += still_open.pop()
        else:
            line += str(rng.choice(list(_BRACKETS)))
            still_open.append(_BRACKETS[line[-1]])
    return line + "".join(reversed(still_open))
