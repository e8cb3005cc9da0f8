"""Eight virtual CPU devices, no network, deterministic float32 products: set before JAX is imported."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the suite's time is compilation; the parity tolerances hold either way, and run time does not matter here.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Nor need anything be compiled twice: processes of the suite, and those that tests start, share what they compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="osjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# Files of few but long tests, longest first: begun last, one of them would keep all other processes waiting.
LONGEST = ("test_loop", "test_notebooks", "test_autoencoders", "test_main_job", "test_generate", "test_encoding")

# How long an example takes says nothing on a machine that others use too; the suite times nothing.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Every program that was compiled keeps areas of memory mapped, of which Linux allows a process 65,530 by default; with
# more the compiler crashes. A worker that runs half of the suite gets there.
MAPPED_AT_MOST = 20_000
MAPS = Path("/proc/self/maps")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, lets go of what was compiled, if it has become much."""
    if nextitem is None or nextitem.path == item.path or "jax" not in sys.modules or not MAPS.exists():
        return
    with MAPS.open("rb") as maps:
        if sum(1 for _ in maps) > MAPPED_AT_MOST:
            sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are handed out in this order (`--no-loadscope-reorder`)."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
