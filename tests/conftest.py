"""Strictness for every test: no silent widening, no silent broadcasting, no warnings.

Dtype promotion has to be written out and arrays of different rank may not meet, which is stricter
than what users run: what passes here passes there. Warnings are errors (see pyproject.toml).
"""

import jax
import pytest

# the script that recorded the trajectories; it needs PyTorch, the tests need only what it wrote
collect_ignore = ["data/record_torch.py"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Run the test with float64 enabled."""
    with jax.enable_x64(True):
        yield
