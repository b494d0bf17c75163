"""What an outer step's hypergradient will take in memory, asked of the compiler without running it."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.problem import Learner, Meta, Task
from bilevel.train.step import mean_hypergradient, num_tasks

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
# What a CPU's matrix products and threads take beside the buffers, measured by bench/plan_grid.py.
CPU_WORKSPACE = 16_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one compiled hypergradient over a batch of tasks.

    Args:
        arguments: meta, the tasks and the estimator's state.
        outputs: the hypergradient and the next state.
        temporary: everything between, at its peak, with the runtime's own workspace.
    """

    arguments: int
    outputs: int
    temporary: int

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs + self.temporary


def parse_memory(memory: str | int | float) -> int:
    """Bytes from "8GiB", "512MB" or a number of bytes.

    Raises:
        ValueError: when it is none of these, or not positive.

    >>> parse_memory("1.5 GiB"), parse_memory("512MB"), parse_memory(4096)
    (1610612736, 512000000, 4096)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(memory).lower())
    try:
        if found is None:
            raise ValueError
        size = int(float(found[1]) * _UNITS[found[2]])
        if size <= 0:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(
            f'memory must be like "8GiB", "512MB" or a positive number of bytes, got {memory!r}'
        ) from None
    return size


def format_memory(size: float) -> str:
    """Bytes in words, with three figures.

    >>> format_memory(8 * 2**30), format_memory(1_500_000)
    ('8 GiB', '1.43 MiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def compile_hypergradient(learner: Learner, meta: Meta, tasks: Task, task_chunk: int) -> Any:
    """The compiled `(meta, tasks, state, key) -> (Hypergradient, state)`; only shapes are read.

    Args:
        meta, tasks: arrays or `jax.ShapeDtypeStruct`s.
    """
    meta, tasks = shapes(meta), shapes(tasks)
    key = jax.eval_shape(jax.random.key, 0)
    keys = jax.eval_shape(lambda key: jax.random.split(key, num_tasks(tasks)), key)

    def first(meta, tasks, keys):
        estimator = learner.estimator
        return jax.vmap(lambda task, key: estimator.init(learner.problem, learner.solver, meta, task, key))(
            tasks, keys
        )

    state = jax.eval_shape(first, meta, tasks, keys)

    def run(meta, tasks, state, key):
        return mean_hypergradient(learner, meta, tasks, state, key, task_chunk)

    return jax.jit(run).lower(meta, tasks, state, key).compile()


def compiled_memory(compiled: Any) -> Memory:
    """What the compiler says a compiled function takes.

    Raises:
        NotImplementedError: when the platform's compiler does not say.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError(
            f"the compiler for {jax.default_backend()} does not tell what memory a program takes; "
            "measure it instead"
        )
    workspace = CPU_WORKSPACE if jax.default_backend() == "cpu" else 0
    return Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes + workspace
    )


def shapes(tree: Any) -> Any:
    """The same tree with shapes and dtypes for leaves."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
