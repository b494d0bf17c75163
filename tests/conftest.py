"""What every test may use. Tests run on the CPU unless JAX_PLATFORMS says otherwise."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

import jax
import pytest

pytest.register_assert_rewrite("convert_tools")  # it is imported, and its fixtures are loaded by name
jax.config.update("jax_num_cpu_devices", 2)  # for tests/test_sharding.py; all others run on the first
# Most of a test is compilation, and many compile the same: a run that is cut and resumed, for instance.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets that BILEVEL_DATA names; the test is skipped without it."""
    value = os.environ.get("BILEVEL_DATA")
    if not value:
        pytest.skip("BILEVEL_DATA is not set: it names the folder that holds omniglot.npz")
    folder = Path(value)
    # A folder that was asked for and is not there is a mistake, not a reason to skip.
    assert folder.is_dir(), f"BILEVEL_DATA must name a folder, got {value!r}"
    return folder


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
