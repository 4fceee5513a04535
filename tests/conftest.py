"""Eight fake CPU devices, strict promotion, and the shared data where it lies beside the repository."""

import os
from pathlib import Path

# These are read when jax starts, so they come before its import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util

import jax
import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error:::l2m_jax")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Programs are let go of where they are many: each has memory maps, of which a process may have 65,530."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)  # a run in the tests sets it for the whole process
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_text().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data sets and tokenizers; tests that need it are skipped without it."""
    folder = Path(os.environ.get("L2M_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared data set and tokenizers are not beside the repository (nor in L2M_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny() -> ConfigDict:
    """The smallest run with all phases; a test changes a copy."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "configs" / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
