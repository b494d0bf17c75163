"""Reading the pickles that data sets are published in, without running what is written in them.

A pickle is a program: to load one from elsewhere is to run it. Here only plain containers, numbers, text and
NumPy arrays can come out, and NumPy's own unpickling is not called either: it trusts the flags of a dtype, so
a forged one could make an array of bytes pass for an array of objects. Arrays are rebuilt from their bytes.
"""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def read_pickle(path: Path) -> Any:
    """What a pickle of plain data and NumPy arrays holds; those of Python 2 too.

    Args:
        path: the file.

    Returns:
        Dicts, lists, tuples, text, bytes, numbers, and arrays that may be read only. Arrays of objects come
        as lists. Text of Python 2 is read as latin-1, one character a byte.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when it asks for anything else, which is named, or is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "x.pkl"
    ...     _ = path.write_bytes(pickle.dumps({"data": np.arange(3)}))
    ...     read_pickle(path)
    {'data': array([0, 1, 2])}
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a pickle")
    try:
        with path.open("rb") as file:
            return _finished(_Reader(file, encoding="latin1").load())
    except _RefusedError as error:
        raise ValueError(
            f"{path} is not plain data: {error}. Nothing of it was run; get the file from its authors, or "
            "save its arrays with numpy.savez and convert those"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way: KeyError, IndexError, MemoryError, ...
        raise ValueError(
            f"{path} is damaged or no pickle ({type(error).__name__}: {error}); get it again"
        ) from error


class _RefusedError(Exception):
    """The pickle asks for something that is not plain data."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numpy._core since NumPy 2, numpy.core before.
        place = module.replace("numpy._core", "numpy.core")
        if (place, name) not in _ALLOWED:
            raise _RefusedError(f"it asks for {module}.{name}")
        return _ALLOWED[place, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it refers to objects outside itself")


class _Dtype:
    """A NumPy dtype as it is pickled: a code, then its byte order as a state."""

    def __init__(self, code: Any, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code[:1] not in "biufcSUO" or not code[1:].isdigit() | (code == "O"):
            raise _RefusedError(f"it has an array of {code!r}, not of numbers or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # The rest of the state (fields, alignment, flags) is what a forged pickle would abuse.
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise _RefusedError(f"it has a byte order {order!r}")
        if state[2:5] != (None, None, None):
            raise _RefusedError("it has an array of records")
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array as it is pickled: made empty, then given (version, shape, dtype, column order, content)."""

    value: Any

    def __init__(self, kind: Any, *_: Any):
        if kind is not _NDARRAY:
            raise _RefusedError("it has an array of a special class")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        self.value = _array(content, dtype, shape, "F" if by_columns else "C")


def _array(content: Any, dtype: Any, shape: Any, order: str) -> Any:
    if not isinstance(dtype, _Dtype):
        raise _RefusedError("it has an array without a dtype")
    if dtype.dtype == object:
        if not isinstance(content, list) or len(shape) != 1:
            raise _RefusedError("it has an array of objects that is no plain list")
        return content
    content = content.encode("latin1") if isinstance(content, str) else content
    count = math.prod(shape)
    if len(content) != count * dtype.dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype.dtype} has {len(content)} bytes")
    return np.frombuffer(content, dtype.dtype, count).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
    array = _Array(_NDARRAY)
    array.value = _array(content, dtype, shape, order)
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    return _array(content, dtype, (1,), "C")[0].item()


def _encode(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes for Python 2. Other codecs unpack archives.
    if encoding != "latin1":
        raise _RefusedError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class _Function:
    """A function that a pickle may call but not change, as it may the attributes of a plain one."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function")


_NDARRAY = object()  # stands for numpy.ndarray and can make nothing
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Function(_from_buffer),
    ("_codecs", "encode"): _Function(_encode),
    ("collections", "OrderedDict"): dict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("__builtin__", "bytes"): _Function(lambda: b""),  # only how an empty one is written for Python 2
}


def _finished(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """The same with arrays in place of their stand-ins, in lists, tuples and dicts."""
    seen = {} if seen is None else seen
    if depth > 20:
        raise ValueError("containers are nested more than 20 deep")
    if isinstance(value, _Array):
        return _finished(value.value, seen, depth) if isinstance(value.value, list) else value.value
    if not isinstance(value, list | tuple | dict):
        return value
    if id(value) not in seen:  # once each: shared parts of a small file could be seen very often
        if isinstance(value, dict):
            seen[id(value)] = {k: _finished(v, seen, depth + 1) for k, v in value.items()}
        else:
            seen[id(value)] = type(value)([_finished(v, seen, depth + 1) for v in value])
    return seen[id(value)]
