"""What the backward pass through an inner loop keeps, and what it computes again.

A policy has one method, `run(steps, state, num_steps)`: run `num_steps` steps from `state`, where
`steps(state, n)` runs n of them plainly. It returns the last state and the outputs of all steps, with a
leading axis `[num_steps]`. Values and gradients are those of `steps(state, num_steps)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bilevel.problem import InnerState

Steps = Callable[[InnerState, int], tuple[InnerState, Any]]

_STATE = "bilevel_inner_state"
GRADIENT = "bilevel_inner_gradient"  # the name that `inner.Gradient` gives to each inner gradient


@runtime_checkable
class Checkpointing(Protocol):
    """What a policy does; write your own with this one method."""

    def run(self, steps: Steps, state: InnerState, num_steps: int) -> tuple[InnerState, Any]: ...


@dataclass(frozen=True)
class Every:
    """Keep the state before every `num_steps`-th step; compute the steps between again.

    Args:
        num_steps: s, the steps from one kept state to the next. 1 recomputes every step by itself.
        keep_gradients: keep the inner gradients too, so that only the optimizer's own arithmetic is
            computed again. For s = 1: with s > 1 a segment's gradients are kept beside its first state.

    Raises:
        ValueError: when `num_steps` is no whole number of at least 1.

    Cost: one more run of the inner loop in time, almost none with `keep_gradients`; memory O(K/s states + s
    steps), and K gradients with `keep_gradients`.

    Reference: Griewank and Walther, 2000; for kept gradients Kemaev et al., MixFlow-MG, 2025.

    >>> import bilevel as bl
    >>> bl.hypergrad.Mixed(checkpoint=Every(10)) is not None
    True
    """

    num_steps: int = 1
    keep_gradients: bool = False

    def __post_init__(self):
        _require_count("Every.num_steps", self.num_steps, 1)

    def run(self, steps: Steps, state: InnerState, num_steps: int) -> tuple[InnerState, Any]:
        """Segments of `num_steps` steps, and a shorter last one."""
        policy = jax.checkpoint_policies.save_only_these_names(GRADIENT) if self.keep_gradients else None
        return _segments(steps, state, num_steps, self.num_steps, policy)


@dataclass(frozen=True)
class Sqrt:
    """Segments of about √K steps: the least memory with one recomputation.

    Cost: one more run of the inner loop in time; memory O(√K (state + what one step keeps)).

    Reference: Chen, Xu, Zhang, Guestrin, 2016.

    >>> import bilevel as bl
    >>> bl.hypergrad.Mixed(checkpoint=Sqrt()) is not None
    True
    """

    def run(self, steps: Steps, state: InnerState, num_steps: int) -> tuple[InnerState, Any]:
        """As `Every(√K)`."""
        return _segments(steps, state, num_steps, max(1, round(math.sqrt(num_steps))), None)


@dataclass(frozen=True)
class Tree:
    """A tree of kept states: each block of steps is `branching` smaller ones, down to single steps.

        depth d = ⌈log_b K⌉;   kept at once: at most (2b − 1) states a level and one step's activations

    Args:
        branching: b, at least 2, the blocks of each level. Fewer kept states with a small one, fewer
            recomputations with a large one; ⌈K^(1/3)⌉ gives three levels.

    Raises:
        ValueError: when `branching` is no whole number of at least 2.

    Cost: d more runs of the inner loop in time; memory O(b log_b K states + one step). The compiler works
    through about d² copies of a step, so a branching of 2 is slow to compile for long loops.

    Reference: Griewank, 1992; the k-ary tree as in REPLAY, 2025.

    >>> import bilevel as bl
    >>> bl.hypergrad.Mixed(checkpoint=Tree(branching=16)) is not None
    True
    """

    branching: int = 16

    def __post_init__(self):
        _require_count("Tree.branching", self.branching, 2)

    def run(self, steps: Steps, state: InnerState, num_steps: int) -> tuple[InnerState, Any]:
        """`branching` equal blocks, each a tree; what does not divide is run as single steps before them."""
        if num_steps == 0:
            return steps(state, 0)
        size, rest = divmod(num_steps, self.branching)
        if size == 0:
            return _repeat(_of(steps, 1), state, num_steps)
        first = None
        if rest:
            state, first = _repeat(_of(steps, 1), state, rest)
        one = _of(steps, 1) if size == 1 else partial(self.run, steps, num_steps=size)
        state, out = _repeat(one, state, self.branching)
        return state, out if first is None else _concatenate(first, out)


@dataclass(frozen=True)
class Offload:
    """Every inner state is kept, in the host's memory instead of the accelerator's; steps are recomputed.

    Args:
        source: the kind of memory that the states come from.
        target: the kind of memory that they go to.

    Raises:
        ValueError: at the run, when the default device cannot reach memory of the kind `target`.

    Cost: one more run of the inner loop and two transfers of the state a step in time; device memory O(one
    step), host memory O(K dim φ). Pays on accelerators; on a CPU both memories are the same.

    Reference: Kemaev et al., MixFlow-MG, 2025 (host offloading of inner states).

    >>> import bilevel as bl
    >>> bl.hypergrad.Mixed(checkpoint=Offload()) is not None
    True
    """

    source: str = "device"
    target: str = "pinned_host"

    def run(self, steps: Steps, state: InnerState, num_steps: int) -> tuple[InnerState, Any]:
        """One segment a step; the state it starts from goes to the host."""
        device = jax.devices()[0]
        kinds = sorted({memory.kind for memory in device.addressable_memories()})
        if self.target not in kinds:
            raise ValueError(
                f"Offload needs memory of the kind {self.target!r}, and {device.platform} has {kinds}; "
                "use bl.inner.Sqrt() or bl.inner.Tree(), which need none"
            )
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_STATE],
            offload_src=self.source,
            offload_dst=self.target,
        )

        def named(state, n):
            # Integers (step counts) are not worth a transfer, and cost nothing to keep.
            return steps(jax.tree.map(_name_float, state), n)

        return _segments(named, state, num_steps, 1, policy)


def as_policy(checkpoint: "int | Checkpointing | None") -> Checkpointing | None:
    """An int means `Every(int)`."""
    return Every(checkpoint) if isinstance(checkpoint, int) else checkpoint


def _segments(steps: Steps, state, num_steps: int, size: int, policy) -> tuple[InnerState, Any]:
    """Full segments in a loop, then the rest; each keeps its first state and what `policy` names."""
    if num_steps == 0:
        return steps(state, 0)
    count, rest = divmod(num_steps, size)
    if count == 0:
        return _repeat(_of(steps, rest), state, 1, policy)
    state, out = _repeat(_of(steps, size), state, count, policy)
    if rest == 0:
        return state, out
    state, last = _repeat(_of(steps, rest), state, 1, policy)
    return state, _concatenate(out, last)


def _of(steps: Steps, n: int) -> Callable:
    return lambda state: steps(state, n)


def _repeat(block: Callable, state, count: int, policy=None) -> tuple[InnerState, Any]:
    """`count` blocks, each of which keeps only the state it starts from."""
    if count == 1:  # outside a loop the compiler would merge the second run of a block with the first
        return jax.checkpoint(block, policy=policy)(state)
    # A loop already keeps the two runs apart.
    body = jax.checkpoint(lambda state, _: block(state), prevent_cse=False, policy=policy)
    state, out = jax.lax.scan(body, state, length=count)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _concatenate(first, last):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def _name_float(leaf):
    return checkpoint_name(leaf, _STATE) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf


def _require_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
