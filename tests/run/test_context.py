"""Where a run keeps its compiled programs."""

import os
import subprocess
import sys

import pytest

_CODE = """
import jax
from l2m_jax.run import context
context._use_compilation_cache()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""
_OWN = {"JAX_COMPILATION_CACHE_DIR": "own", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7.0"}


@pytest.mark.parametrize("own", [{}, _OWN])
def test_compiled_programs_are_kept_where_the_user_says_or_beside_the_hashes(tmp_path, own):
    environment = {name: value for name, value in os.environ.items() if name not in _OWN}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)} | own
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True)
    expected = "own 7.0" if own else f"{tmp_path / 'l2m_jax' / 'xla'} 0.1"
    assert done.stdout.strip() == expected, done.stderr
