"""Strictness for every test: no silent widening, no silent broadcasting, no warnings.

Dtype promotion has to be written out and arrays of different rank may not meet, which is stricter
than what users run: what passes here passes there. Warnings are errors (see pyproject.toml).
"""

import contextlib
import functools
import gc
import importlib.util
import os

import jax
import jax._src.interpreters.mlir
import pytest
from table import TRANSFORMATIONS

# what they assert is explained as in a test
pytest.register_assert_rewrite("agreement", "agreement_family", "helpers", "recordings", "scripts")

# the script that recorded the trajectories needs PyTorch, the tests need only what it wrote; and
# typed.py is for pyright: it holds mistakes
collect_ignore = ["data/record_torch.py", "typed.py"]

# Most of a test's time is compiling, and XLA's older emitters of loops compile for a CPU in a third
# of the time of those that it takes by itself. With XLA_FLAGS= (empty) the tests use the latter. An
# older XLA does not know the first of the two flags, nor do the compilers of GPU and TPU.
others = any(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")))
if jax.__version_info__ >= (0, 10) and not others:
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# JAX makes a context of MLIR for each program, which takes two thirds of the time of lowering the
# small ones here; one for all has no other effect, and a JAX that makes none is as well
with contextlib.suppress(AttributeError):
    lowering = jax._src.interpreters.mlir
    lowering.make_ir_context = functools.cache(lowering.make_ir_context)


def pytest_configure(config: pytest.Config) -> None:
    """Keep what is compiled in pytest's cache, since much of it is compiled again."""
    if not hasattr(config, "cache"):  # with -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish() -> None:
    """Collect garbage rarely: it takes a tenth of the time, since few of the many objects go."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


@pytest.fixture
def x64():
    """Run the test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Promote dtypes as JAX does by default: Optax multiplies int32 by float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def plain_jax():
    """Promote dtypes and ranks as JAX does by default, as in what users run."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def promotion_of_foreign_stages(request):
    """Promote dtypes for a line of table.py that has stages of Optax; adamx needs none of it."""
    foreign = TRANSFORMATIONS[request.getfixturevalue("name")].foreign
    with jax.numpy_dtype_promotion("standard" if foreign else "strict"):
        yield


@pytest.fixture
def quick_compiler():
    """Compile without optimising, which takes less time, where the numbers do not depend on it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
