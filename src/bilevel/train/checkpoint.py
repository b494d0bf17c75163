"""Checkpoints that survive being killed: a state comes back bit for bit, or an error says why not.

    checkpoints/00000200/state-3f9c2a1b/   the leaves, written by orbax
    checkpoints/00000200/manifest.json     step, fingerprint, leaves, and size and CRC of every file

The manifest is written last and by one atomic rename, so it is what makes a checkpoint complete:
a process killed at any moment leaves the old manifest, the new one, or none.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MANIFEST = "manifest.json"
UNFINISHED = f"{MANIFEST}.unfinished"
REMEDY = "use the same flags as in config.json, or another --folder"


class Checkpoints:
    """The newest `keep` states of a run, one folder each, for one process that writes.

    Args:
        folder: where they are; made by the first `save`.
        keep: how many complete ones stay.

    Raises:
        ValueError: when `keep` is below 1.

    >>> import tempfile
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
    >>> for step in (1, 2, 3):
    ...     checkpoints.save(step, {"meta": jnp.full(2, step)}, {"recipe": "maml"})
    >>> checkpoints.restore({"meta": jnp.zeros(2, int)}, {"recipe": "maml"})
    ({'meta': Array([3, 3], dtype=int32)}, 3)
    """

    def __init__(self, folder: Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"Checkpoints.keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, state: Any, fingerprint: dict[str, Any]) -> None:
        """Write `state` to disk, then delete all but the newest `keep`.

        Args:
            step: outer steps done so far, at least 0.
            state: any pytree of arrays, typed keys and Python numbers.
            fingerprint: small JSON dict that a run must share to read this state.

        Raises:
            OSError: when the disk is full or not writable; earlier checkpoints are left as they are.
            TypeError: when a leaf is no array or number, or the fingerprint is not JSON.
        """
        orbax = _import_orbax()
        manifest = {
            "step": int(step),
            "fingerprint": _as_json(fingerprint),
            "leaves": _describe(state),
        }
        arrays = {f"leaf_{i}": _to_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        arrays = {name: array for name, array in arrays.items() if array.size}  # orbax's limit
        folder = self._path(step)
        state_name = f"state-{uuid.uuid4().hex[:8]}"  # beside the state of an earlier save
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _quiet(), orbax.PyTreeCheckpointer() as writer:
                if arrays:
                    writer.save((folder / state_name).absolute(), arrays)
            _commit(folder, {**manifest, "files": _checksums(folder, state_name)})
        except Exception as error:
            for unfinished in folder.glob(f"{state_name}*"):  # orbax adds a suffix until it is done
                shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / UNFINISHED).unlink(missing_ok=True)
                folder.rmdir()  # refused, as it should be, where an earlier save left something
            number = _os_error(error)
            if number is None:
                raise
            raise OSError(
                number,
                f"checkpoint of step {step} could not be saved in {self.folder} "
                f"({os.strerror(number)}): free some space or make it writable, then run the same "
                "command to resume",
            ) from error
        self._prune(step, state_name)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none.

        A half-written or damaged one is ignored with a warning that names it.
        """
        return next(iter(self._complete_steps()), None)

    def restore(self, template: Any, fingerprint: dict[str, Any], step: int | None = None) -> tuple[Any, int]:
        """Read a state back, bit for bit: `(state, step)`.

        Args:
            template: a tree like the saved one; gives structure, shapes, dtypes and placement.
            fingerprint: the one `save` was given.
            step: which one; None is the newest that can be read.

        Raises:
            FileNotFoundError: when there is no such checkpoint.
            ValueError: when it belongs to another run, or when none can be read.
        """
        steps = self._steps() if step is None else [step]
        if not steps or not self._path(steps[0]).is_dir():
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(
                f"no {wanted} in {self.folder}, found steps {sorted(self._steps())}: "
                "start a new run there, or name the folder of an existing one"
            )
        for candidate in steps:
            folder = self._path(candidate)
            problem = _damage(folder, read=True)
            if not problem:
                manifest = _read_manifest(folder)
                _check_same_run(folder, manifest, fingerprint, template)
                try:
                    arrays = _read_arrays(folder, manifest)
                except Exception as error:  # the files are as written: orbax cannot read its own
                    problem = str(error).splitlines()[0]
                else:
                    return _rebuild(template, arrays, manifest["leaves"]), candidate
            if step is not None:
                raise ValueError(f"checkpoint {folder} is damaged ({problem}): restore another")
            warnings.warn(f"ignoring damaged checkpoint {folder}: {problem}", stacklevel=2)
        raise ValueError(
            f"none of the {len(steps)} checkpoints in {self.folder} can be read: "
            "delete the folder, or use another --folder, to start again"
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _steps(self) -> list[int]:
        """All steps that have a folder, complete or not, newest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        steps = (int(name) for name in names if name.isascii() and name.isdigit())
        return sorted((step for step in steps if self._path(step).is_dir()), reverse=True)

    def _complete_steps(self):
        for step in self._steps():
            problem = _damage(self._path(step), read=False)
            if not problem:
                yield step
            else:
                warnings.warn(f"ignoring incomplete checkpoint {self._path(step)}: {problem}", stacklevel=3)

    def _prune(self, saved: int, state_name: str) -> None:
        # The one just saved always stays, even where a newer one exists: that one may be damaged.
        others = [step for step in self._steps() if step != saved]
        complete = [step for step in others if not _damage(self._path(step), read=False)]
        for step in set(others) - set(complete[: self.keep - 1]):
            # Without its manifest first: killed half-way, what remains is incomplete by definition.
            with contextlib.suppress(OSError):
                (self._path(step) / MANIFEST).unlink()
            shutil.rmtree(self._path(step), ignore_errors=True)
        for entry in self._path(saved).iterdir():  # what an earlier save of this step left
            if entry.name not in (MANIFEST, state_name):
                shutil.rmtree(entry, ignore_errors=True)


def _import_orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoints need orbax: pip install 'bilevel[train]'") from error
    return orbax.checkpoint


@contextlib.contextmanager
def _quiet():
    """Silence the log of orbax while it runs: what goes wrong is raised as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(tree: Any) -> list[dict[str, Any]]:
    """Path, dtype and shape of every leaf; `impl` for keys."""
    described = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path) or "state"
        if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
            row = {"path": name, "dtype": type(leaf).__name__, "shape": []}
        elif hasattr(leaf, "dtype") and hasattr(leaf, "shape") and leaf.dtype != object:
            row = {"path": name, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        else:
            raise TypeError(
                f"a state holds arrays, keys and numbers, got {type(leaf).__name__} at {name}: "
                "keep everything else outside of it"
            )
        if _is_key(leaf) and isinstance(leaf, jax.Array):  # a template may be abstract
            row["impl"] = str(jax.random.key_impl(leaf))
        described.append(row)
    return described


def _to_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _rebuild(template: Any, arrays: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> Any:
    leaves, structure = jax.tree.flatten(template)
    for i, (leaf, row) in enumerate(zip(leaves, rows)):
        if f"leaf_{i}" in arrays:
            leaves[i] = _like(leaf, arrays[f"leaf_{i}"], row)
        elif isinstance(leaf, jax.ShapeDtypeStruct):  # an array without elements
            leaves[i] = jnp.zeros(leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, leaves)


def _like(leaf: Any, array: np.ndarray, saved: dict[str, Any]) -> Any:
    """`array` as the kind of thing that `leaf`, of the same shape and dtype, is."""
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, np.ndarray):
        return array
    if isinstance(leaf, bool | int | float | complex):
        return type(leaf)(array)
    value = jnp.array(array)  # a copy: the result may be donated
    if _is_key(leaf):
        value = jax.random.wrap_key_data(value, impl=saved["impl"])
    # An uncommitted array stays so: a committed one would make jit compile once more.
    return jax.device_put(value, leaf.sharding) if getattr(leaf, "committed", False) else value


def _as_json(fingerprint: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(fingerprint))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a fingerprint must be a dict of JSON values: {error}") from None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, so that a difference can be named."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    names = {key: f"{prefix}.{key}" if prefix else key for key in value}
    return {name: leaf for key in value for name, leaf in _flat(value[key], names[key]).items()}


def _check_same_run(folder: Path, manifest: dict, fingerprint: dict, template: Any) -> None:
    """Raise a ValueError that names the first difference in fingerprint or leaves."""
    there, here = _flat(manifest["fingerprint"]), _flat(_as_json(fingerprint))
    for name in {**there, **here}:
        if there.get(name) != here.get(name) or (name in there) != (name in here):
            was, now = (repr(side[name]) if name in side else "none" for side in (there, here))
            raise ValueError(f"checkpoint {folder} has {name} {was}, this run {now}: {REMEDY}")
    saved = {row["path"]: row for row in manifest["leaves"]}
    wanted = {row["path"]: row for row in _describe(template)}
    for path in {**wanted, **saved}:
        was, now = (_leaf_text(rows.get(path)) for rows in (saved, wanted))
        if was != now:
            raise ValueError(f"checkpoint {folder} has {was} at {path}, this run {now}: {REMEDY}")
    if list(saved) != list(wanted):
        raise ValueError(f"checkpoint {folder} has its leaves in another order: {REMEDY}")


def _leaf_text(row: dict[str, Any] | None) -> str:
    return "no leaf" if row is None else f"{row['dtype']}[{','.join(map(str, row['shape']))}]"


def _checksums(folder: Path, state_name: str) -> dict[str, list[int]]:
    """{file name: [size, CRC-32]} of everything that was written."""
    files = (path for path in sorted((folder / state_name).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): list(_size_and_crc(path)) for path in files}


def _size_and_crc(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _commit(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / UNFINISHED).write_text(json.dumps(manifest), encoding="utf-8")
    os.replace(folder / UNFINISHED, folder / MANIFEST)


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _damage(folder: Path, read: bool) -> str:
    """What is wrong with a checkpoint, "" if nothing; with `read`, file contents are checked too."""
    try:
        files = _read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}, it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, crc) in files.items():
        try:
            found = _size_and_crc(folder / name) if read else ((folder / name).stat().st_size, crc)
        except OSError:
            return f"{name} is missing"
        if found != (size, crc):
            return f"{name} is not as written ({found[0]} bytes, expected {size})"
    return ""


def _read_arrays(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    if not manifest["files"]:
        return {}
    state = folder / Path(next(iter(manifest["files"]))).parts[0]
    with _quiet(), _import_orbax().PyTreeCheckpointer() as reader:
        return reader.restore(state.absolute())


def _os_error(error: Exception) -> int | None:
    """The errno of a failed write, None for other errors; tensorstore has it only in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)
