"""What every test may use. Tests run on the CPU unless JAX_PLATFORMS says otherwise."""

import os
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
# Most of a test is compilation, and many compile the same: a run that is cut and resumed, for instance. In
# the environment, so that the processes which tests start share what was compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# LLVM's optimizations and XLA's fused loops are three quarters of a compilation on a CPU, and gain nothing on
# problems of this size. JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= tests the programs that users get.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

pytest.register_assert_rewrite("convert_tools")  # it is imported, and its fixtures are loaded by name
jax.config.update("jax_num_cpu_devices", 2)  # for tests/test_sharding.py; all others run on the first


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


@pytest.fixture
def optimized():
    """`with optimized():` lets LLVM optimize, as it does for users: it may reorder what is summed.

    Only programs belong in it. Operations one by one stay in memory as they were compiled first, and a state
    that later tests make with them would have other last bits than that of another process.
    """

    @contextmanager
    def switched():
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)

    return switched
