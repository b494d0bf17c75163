"""Where in the user's own files an operation of a trace was written."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

# Frames of these say how an operation was reached, not who wrote it.
_LIBRARIES = tuple(str(Path(module.__file__ or "").parent) + os.sep for module in (jax, optax, np))
_OURS = Path(__file__).parent.parent
_ENGINE = (
    *(str(_OURS / part) + os.sep for part in ("analysis", "hypergrad", "inner", "train")),
    str(_OURS / "linalg.py"),
    str(_OURS / "problem.py"),
)
# Inside JAX: how an operation is bound and traced. Anything else of JAX's is a function of its own.
_PLUMBING = ("core.py", "partial_eval.py", "source_info_util.py", "tree_util.py", "traceback_util.py",
             "api_util.py", "lax/lax.py", "config.py", "profiler.py", "api.py", "pjit.py", "linear_util.py",
             "numpy/ufuncs.py", "numpy/lax_numpy.py", "lax/control_flow/conditionals.py", "util.py",
             "lax/control_flow/loops.py", "lax/control_flow/common.py", "array_methods.py")  # fmt: skip


def where(eqn: Any) -> str | None:
    """`file.py:12 (function)` of the innermost frame that is neither JAX's, optax's nor the engine's."""
    for frame in _frames(eqn):
        if not _is_library(frame.file_name):
            return f"{Path(frame.file_name).name}:{frame.line_num} ({frame.function_name})"
    return None


def written_by_user(eqn: Any) -> bool | None:
    """Whether the user's own code called the operation, rather than a library function it uses.

    `jax.nn.log_softmax` holds a `stop_gradient` that is right where it stands. None inside the trace of a
    jitted function such as `jnp.round`: whoever called that one decides.
    """
    for frame in _frames(eqn):
        if not _is_library(frame.file_name):
            return True
        if not frame.file_name.endswith(_PLUMBING):
            return False
    return None


def inside_function(eqn: Any, name: str) -> bool:
    """Whether the user's function `name` encloses the operation: its own frames then say where it is."""
    return any(
        frame.function_name.rpartition(".")[2] == name and not _is_library(frame.file_name)
        for frame in _frames(eqn)
    )


def _frames(eqn: Any) -> list[Any]:
    traceback = getattr(eqn.source_info, "traceback", None)
    return [] if traceback is None else list(traceback.frames)


@cache
def _is_library(file: str) -> bool:
    return file.startswith((*_LIBRARIES, *_ENGINE)) or file.startswith("<frozen")
