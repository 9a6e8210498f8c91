"""Every test process has 8 virtual CPU devices, refuses silent broadcasting, and shares one compilation cache."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# Set before JAX starts, and inherited by the subprocesses that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "compilation"))
os.environ.setdefault("FOUNDRY_CACHE", str(ROOT / ".cache" / "data"))
# Tests run each program a few times on a few numbers: compiling fast (3 times, measured) beats running fast.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from foundry_jax import compilation  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
compilation.enable_cache()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real data beside the checkout")
    return folder


MAPS_LIMIT = 30_000  # Linux refuses a process more than 65530 memory maps; XLA:CPU takes 50 to 400 for each program


@pytest.fixture(autouse=True)
def no_more_memory_maps_than_linux_allows():
    """Forgets compiled programs once they take up many memory maps: beyond the limit, compiling fails."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS_LIMIT:
        from tests import variants

        for cached in (variants.forward, variants.placed, variants.decoder, variants.gradient):
            cached.cache_clear()
        jax.clear_caches()
