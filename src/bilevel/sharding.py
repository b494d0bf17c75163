"""The tasks of an outer step spread over the devices of a machine.

Every device runs the same outer loop on its own tasks, and once a step the sum of the hypergradients is
taken over all of them: meta and the outer optimizer's state are kept whole on each.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

AXIS = "tasks"


class Shard(NamedTuple):
    """Which tasks of a batch a device has; used inside `jax.shard_map` over the axis `AXIS`.

    Args:
        devices: how many there are.
        num_tasks: of the whole batch.
    """

    devices: int
    num_tasks: int

    @property
    def size(self) -> int:
        """Tasks on each device; where the batch does not divide evenly some are computed twice."""
        return -(-self.num_tasks // self.devices)

    def rows(self) -> tuple[jax.Array, jax.Array | None]:
        """The places `[size]` of this device's tasks in the batch, and which count, None for all."""
        rows = jax.lax.axis_index(AXIS) * self.size + jnp.arange(self.size)
        if self.num_tasks % self.devices == 0:
            return rows, None
        return jnp.minimum(rows, self.num_tasks - 1), rows < self.num_tasks


def make_devices(devices: int) -> None:
    """Have JAX split a CPU into so many devices; without effect once it has computed anything."""
    with contextlib.suppress(RuntimeError):  # too late: `tasks_mesh` says so where they are too few
        jax.config.update("jax_num_cpu_devices", devices)


def tasks_mesh(devices: int) -> Mesh:
    """A mesh of so many of the devices that JAX sees.

    Raises:
        ValueError: when it sees fewer.
    """
    found = jax.devices()
    if devices > len(found):
        remedy = (
            f'; call jax.config.update("jax_num_cpu_devices", {devices}) before anything is computed'
            if found[0].platform == "cpu"
            else ""
        )
        raise ValueError(f"devices={devices}, but JAX sees {len(found)} ({found[0].platform}){remedy}")
    return Mesh(np.array(found[:devices]), (AXIS,))


def sum_over_devices(tree: Any) -> Any:
    """Every leaf summed over the devices, in one message: each costs a meeting of all of them."""
    flat, restore = ravel_pytree(tree)
    return restore(jax.lax.psum(flat, AXIS))
