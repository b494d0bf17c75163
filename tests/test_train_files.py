"""What a run writes: checkpoints that outlive any death, metrics that resume, a display."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.train.checkpoint import Checkpoints

RECIPE = {"recipe": "maml-glyphs", "optimizer": {"rate": 0.1}}


class State(NamedTuple):
    meta: Any
    opt_state: Any
    key: Any
    step: Any
    rest: Any = ()


def make_state(width: int = 4, seed: int = 0) -> State:
    meta = {"w": jnp.arange(width, dtype=jnp.float32) / 3 + seed, "b": jnp.float32(0.1)}
    return State(meta, optax.adam(1e-3).init(meta), jax.random.key(seed), jnp.int32(7))


def leaf_bytes(leaf) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(got), jax.tree_util.tree_leaves_with_path(expected), strict=True)
    for new, (path, old) in pairs:
        name = jax.tree_util.keystr(path)
        assert type(new) is type(old), name
        assert getattr(new, "dtype", None) == getattr(old, "dtype", None), name
        assert np.shape(new) == np.shape(old), name
        assert leaf_bytes(new) == leaf_bytes(old), name


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def cut_a_file(checkpoint: Path):
    """Cut the largest file of a checkpoint in the middle."""
    largest = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip_a_bit(checkpoint: Path):
    largest = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def remove_a_file(checkpoint: Path):
    next(checkpoint.rglob("_METADATA")).unlink()


def remove_manifest(checkpoint: Path):
    (checkpoint / "manifest.json").unlink()


def cut_manifest(checkpoint: Path):
    (checkpoint / "manifest.json").write_text('{"step": 2, "fi')


# Checkpoints


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path, x64):
    rest = {
        "bits": jnp.array([jnp.nan, -0.0, 1e-40], jnp.float32),
        "bfloat16": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "float64": jnp.float64(1) / 3,
        "int64": jnp.arange(3) + 2**40,
        "bool": jnp.array([True, False]),
        "no elements": jnp.zeros((0, 3)),
        "numpy": [np.arange(3, dtype=np.uint8), np.float64(0.1), np.bool_(True)],
        "python": (3, True, 0.1, None),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    }
    state = make_state()._replace(rest=rest)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, RECIPE)
    restored, step = checkpoints.restore(state, RECIPE)
    assert step == 5
    assert_identical(restored, state)
    assert jax.random.key_impl(restored.rest["keys"]) == "rbg"


def test_a_template_may_be_abstract(tmp_path):
    state = make_state()
    Checkpoints(tmp_path).save(1, state, RECIPE)
    restored, _ = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state), RECIPE)
    assert_identical(restored, state)


def test_a_restored_state_does_not_compile_again(tmp_path):
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state._replace(step=state.step + 1)

    state = step(make_state())
    Checkpoints(tmp_path).save(1, state, RECIPE)
    for template in (make_state(), state):
        step(Checkpoints(tmp_path).restore(template, RECIPE)[0])
    assert len(traces) == 1


def test_the_newest_are_kept_and_a_step_can_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (10, 20, 30, 30):
        checkpoints.save(step, make_state(seed=step), RECIPE)
    checkpoints.save(30, make_state(seed=31), RECIPE)
    assert sorted(os.listdir(checkpoints.folder)) == ["00000020", "00000030"]
    assert len(os.listdir(checkpoints.folder / "00000030")) == 2
    assert checkpoints.latest() == 30
    assert_identical(checkpoints.restore(make_state(), RECIPE)[0], make_state(seed=31))
    assert_identical(checkpoints.restore(make_state(), RECIPE, step=20)[0], make_state(seed=20))


def test_saving_is_fast_and_quiet(tmp_path, capfd):
    state = make_state(width=250_000)  # 3 MB
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, RECIPE)  # imports orbax
    seconds = []
    for step in (1, 2, 3):
        begin = time.perf_counter()
        checkpoints.save(step, state, RECIPE)
        seconds.append(time.perf_counter() - begin)
    checkpoints.restore(state, RECIPE)
    assert min(seconds) < 1, f"saving 3 MB took {seconds} s, tens of milliseconds are usual"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fingerprint", "state", "said"),
    [
        ({**RECIPE, "recipe": "reptile"}, make_state(), "has recipe 'maml-glyphs', this run 'rep"),
        ({**RECIPE, "optimizer": {"rate": 0.2}}, make_state(), "optimizer.rate 0.1, this run 0.2"),
        ({**RECIPE, "extra": None}, make_state(), "has extra none, this run None"),
        (RECIPE, make_state(5), r"float32\[4\] at .meta\['w'\], this run float32\[5\]"),
        (RECIPE, make_state()._replace(step=jnp.float32(0)), r"int32\[\] at .step, this run flo"),
        (RECIPE, make_state()._replace(key=jax.random.key(0, impl="rbg")), "at .key, this run"),
        (RECIPE, make_state()._replace(rest=jnp.ones(2)), "has no leaf at .rest, this run float32"),
        (RECIPE, make_state()._replace(meta={}), r"at .meta\['b'\], this run no leaf"),
    ],
)
def test_another_run_is_refused_by_its_first_difference(tmp_path, fingerprint, state, said):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), RECIPE)
    with pytest.raises(ValueError, match=said) as caught:
        checkpoints.restore(state, fingerprint)
    assert "the same flags as in config.json, or another --folder" in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGE = [cut_a_file, flip_a_bit, remove_a_file, remove_manifest, cut_manifest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(seed=1), RECIPE)
    checkpoints.save(2, make_state(seed=2), RECIPE)
    damage(tmp_path / "00000002")
    with pytest.warns(UserWarning, match="00000002"):
        restored, step = checkpoints.restore(make_state(), RECIPE)
    assert step == 1
    assert_identical(restored, make_state(seed=1))
    if damage is not flip_a_bit:  # latest() does not read the files through
        with pytest.warns(UserWarning, match="incomplete checkpoint .*00000002"):
            assert checkpoints.latest() == 1
    checkpoints.save(2, make_state(seed=2), RECIPE)
    assert_identical(checkpoints.restore(make_state(), RECIPE)[0], make_state(seed=2))


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_but_damage_is_one_clear_error(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, make_state(), RECIPE)
    damage(tmp_path / "00000002")
    with (
        pytest.warns(UserWarning, match="00000002"),
        pytest.raises(ValueError, match=r"none of the 1 checkpoints .* another --folder"),
    ):
        checkpoints.restore(make_state(), RECIPE)
    with pytest.raises(ValueError, match="00000002 is damaged"):
        checkpoints.restore(make_state(), RECIPE, step=2)


def test_no_checkpoint_is_said_with_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoints(tmp_path / "absent").restore(make_state(), RECIPE)
    Checkpoints(tmp_path).save(1, make_state(), RECIPE)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .* found steps \[1\]"):
        Checkpoints(tmp_path).restore(make_state(), RECIPE, step=9)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"got str at .rest\['name'\]"):
        Checkpoints(tmp_path).save(1, make_state()._replace(rest={"name": "x"}), RECIPE)
    with pytest.raises(TypeError, match="fingerprint must be a dict of JSON"):
        Checkpoints(tmp_path).save(1, make_state(), {"recipe": object()})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be saved in .*file.* make it writable"):
        Checkpoints(tmp_path / "file").save(1, make_state(), RECIPE)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    # A limit on the size of files stands in for a full disk: the write itself fails the same way.
    done = run_python(
        f"""
        import resource, signal
        from pathlib import Path
        import numpy as np
        from bilevel.train.checkpoint import Checkpoints
        checkpoints = Checkpoints(Path({str(tmp_path)!r}))
        noise = np.random.default_rng(0).integers(0, 256, 1_000_000).astype(np.uint8)
        checkpoints.save(1, noise, {{}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for step in (1, 2):
            try:
                checkpoints.save(step, noise, {{}})
            except OSError as error:
                print(error)
        restored, step = checkpoints.restore(noise, {{}})
        assert step == 1 and (restored == noise).all()
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("(File too large): free some space" in line for line in lines)
    assert os.listdir(tmp_path) == ["00000001"]


def test_sigkill_at_any_moment_leaves_a_state_to_restore(tmp_path):
    code = f"""
        from pathlib import Path
        import numpy as np
        from bilevel.train.checkpoint import Checkpoints
        checkpoints = Checkpoints(Path({str(tmp_path)!r}), keep=2)
        with __import__("warnings").catch_warnings(action="ignore"):
            step = (checkpoints.latest() or 0)
        while True:
            step += 1
            for again in range(2):  # the same step twice: replacing must be atomic too
                checkpoints.save(step, {{"x": np.full(50_000, step), "step": step}}, {{}})
            print(step, flush=True)
        """
    chance = random.Random(0)
    template = {"x": np.zeros(50_000, int), "step": 0}
    for _ in range(5):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # at least one is complete
            time.sleep(chance.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that of a half-written checkpoint is expected
            restored, step = Checkpoints(tmp_path).restore(template, {})
        assert restored["step"] == step and (restored["x"] == step).all()
        assert step >= int(said[-1] if said else 0)


def test_without_orbax_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[train\]'"):
        Checkpoints(tmp_path).save(1, make_state(), RECIPE)
    assert not list(tmp_path.iterdir())
