"""Normalization of a convolution's output, and whether it makes a prediction depend on its neighbours.

A norm sees `y [parts, n, pixels, channels]`: all pixels of n examples, in one or several parts (see
`convolution.quarter_patches`), and the block's parameters `{"scale", "bias"}`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax

_EPSILON = 1e-5


class Norm(Protocol):
    """How a block normalizes.

    Args:
        transductive: whether the examples of a batch see one another, so that the answer to a query depends
            on the other queries. An evaluation protocol has to say so.
    """

    transductive: ClassVar[bool]

    def check(self, channels: int) -> None:
        """Refuse a width with a `ValueError`."""
        ...

    def __call__(self, y: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        """`y [parts, n, pixels, channels]`, scale and bias `[channels]`."""
        ...


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm on the statistics of the batch that it is given, in training and at evaluation.

        γ (y − mean) / √(variance + 1e-5) + β,   mean and variance over examples and pixels

    Reference: Ioffe and Szegedy, 2015; transductive as in Finn, Abbeel, Levine, 2017.
    """

    transductive: ClassVar[bool] = True

    def check(self, channels: int) -> None:
        """Any width will do."""

    def __call__(self, y, scale, bias):
        return _standardized(y, y, (0, 1, 2), scale, bias)


@dataclass(frozen=True)
class SupportNorm:
    """Batch norm on the statistics of the first examples of the batch only.

        γ (y − mean) / √(variance + 1e-5) + β,   mean and variance over the first `num_support` examples

    With tasks whose query batch begins with the support (`bilevel.tasks.with_support`), each
    query is normalized by the support alone: not transductive, and gradients flow through the statistics.

    Args:
        num_support: examples of the support.

    Reference: Bronskill et al., TaskNorm, 2020, who name it MetaBN.
    """

    num_support: int
    transductive: ClassVar[bool] = False

    def __post_init__(self):
        if isinstance(self.num_support, bool) or not isinstance(self.num_support, int):
            raise TypeError(f"SupportNorm.num_support must be a whole number, got {self.num_support!r}")
        if self.num_support < 1:
            raise ValueError(f"SupportNorm.num_support must be at least 1, got {self.num_support}")

    def check(self, channels: int) -> None:
        """Any width will do."""

    def __call__(self, y, scale, bias):
        if y.shape[1] < self.num_support:
            raise ValueError(
                f"SupportNorm({self.num_support}) got a batch of {y.shape[1]} examples, fewer than the "
                "support: set num_support to ways * shots, and put the support in front of the queries "
                "(bilevel.tasks.with_support)"
            )
        return _standardized(y, y[:, : self.num_support], (0, 1, 2), scale, bias)


@dataclass(frozen=True)
class GroupNorm:
    """Each example by itself, the channels in groups.

    Args:
        num_groups: groups of channels; 4 are 16 channels a group of 64.

    Reference: Wu and He, 2018.
    """

    num_groups: int = 4
    transductive: ClassVar[bool] = False

    def __post_init__(self):
        if self.num_groups < 1:
            raise ValueError(f"GroupNorm.num_groups must be at least 1, got {self.num_groups}")

    def check(self, channels: int) -> None:
        """The groups must have one size."""
        if channels % self.num_groups:
            raise ValueError(
                f"GroupNorm({self.num_groups}) does not divide {channels} channels; pass "
                "norm=bilevel.nets.GroupNorm(number that divides the filters)"
            )

    def __call__(self, y, scale, bias):
        parts, n, pixels, channels = y.shape
        grouped = y.reshape(parts, n, pixels, self.num_groups, channels // self.num_groups)
        return _standardized(grouped, grouped, (0, 2, 4), 1.0, 0.0).reshape(y.shape) * scale + bias


@dataclass(frozen=True)
class LayerNorm:
    """Each example by itself, all its pixels and channels together.

    Reference: Ba, Kiros, Hinton, 2016.
    """

    transductive: ClassVar[bool] = False

    def check(self, channels: int) -> None:
        """Any width will do."""

    def __call__(self, y, scale, bias):
        return _standardized(y, y, (0, 2, 3), scale, bias)


@dataclass(frozen=True)
class NoNorm:
    """Only the learned scale and bias of each channel."""

    transductive: ClassVar[bool] = False

    def check(self, channels: int) -> None:
        """Any width will do."""

    def __call__(self, y, scale, bias):
        return y * scale + bias


NORMS: dict[str, Callable[[], Norm]] = {
    "batch": BatchNorm,
    "group": GroupNorm,
    "layer": LayerNorm,
    "none": NoNorm,
}


def needs_whole_batch(norm: Norm) -> bool:
    """Whether examples cannot be normalized apart from each other, as far as is known.

    >>> needs_whole_batch(LayerNorm()), needs_whole_batch(SupportNorm(5))
    (False, True)
    """
    return not isinstance(norm, GroupNorm | LayerNorm | NoNorm)


def as_norm(norm: str | Norm, owner: str) -> Norm:
    """The norm of that name, or the norm itself.

    Raises:
        ValueError: for another name.
        TypeError: for what is neither.

    >>> as_norm("group", "conv4")
    GroupNorm(num_groups=4)
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(f"{owner}.norm must be one of {', '.join(NORMS)}, got {norm!r}")
        return NORMS[norm]()
    if not (callable(norm) and hasattr(norm, "transductive") and hasattr(norm, "check")):
        raise TypeError(
            f"{owner}.norm must be one of {', '.join(NORMS)} or a norm such as GroupNorm(8), got {norm!r}"
        )
    return norm


def _standardized(y, seen, axes, scale, bias):
    """γ (y − mean) / std + β with the statistics of `seen` over `axes`."""
    mean = seen.mean(axes, keepdims=True)
    variance = ((seen - mean) ** 2).mean(axes, keepdims=True)
    scale = scale * jax.lax.rsqrt(variance + _EPSILON)
    return y * scale + (bias - mean * scale)
