"""Eight fake CPU devices, strict promotion, and the shared data where it lies beside the repository."""

import os
from pathlib import Path

# These are read when jax starts, so they come before its import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        # The older emitters compile in half the time of the MLIR ones. A version of XLA without them will say so: drop this.
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # every worker has a core of its own
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers and the processes that tests start compile the same small programs: each is compiled once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most of a test's time goes into compiling a program that runs for milliseconds. This leaves out passes of LLVM; XLA's own,
# which decide on buffers and fusions, stay.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Containers often set this. Each process that a test starts would then spend 5 s on compiling Python modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import importlib.util
import inspect
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from filelock import FileLock
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
_KILLED_AT = 5  # updates: before the best validation is known, between two checkpoints

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects, and by default Python looks for cycles among them for an eighth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error:::l2m_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs take longest: they come first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: "tests/run/" not in item.nodeid)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Programs are let go of where they are many: each has memory maps, of which a process may have 65,530."""
    yield
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


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A function that makes a small tokenizer with one of the chat templates in tests/data/templates."""
    from l2m_jax.data.tokenizer import train_tokenizer

    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]

    def make(template: str):
        tokenizer = train_tokenizer(
            ["user assistant system\n\n name a fruit an apple and a pear"] * 3, 330, ()
        )
        tokenizer.add_tokens(special, special_tokens=True)
        file = ROOT / "tests" / "data" / "templates" / f"{template}.jinja"
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture(scope="session", params=["pmap", "fsdp"])
def sampled(request, tmp_path_factory):
    """A run whose memory is sampled: its mapping, its folder, and the most bytes of each moment on each device.

    The models are in `folder`/pretrained, the run in `folder`/`mapping`. All tests and workers share the run.
    """
    base, mapping = tmp_path_factory.getbasetemp(), request.param
    # Workers have folders of their own within a common one.
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / f"sampled_{mapping}"
    folder.mkdir(exist_ok=True)
    most_file = folder / "most.json"
    with FileLock(folder / "lock"):
        if not most_file.is_file():
            most_file.write_text(json.dumps(_sample(mapping, folder)))
    return mapping, folder, json.loads(most_file.read_text())


def _sample(mapping: str, folder: Path) -> dict[str, list[int]]:
    """Runs once until it is killed, and again to the end."""
    most: dict[str, list[int]] = {}
    for kill in ([str(_KILLED_AT)], []):
        output = folder / "memory.json"
        output.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(ROOT / "tests" / "run" / "sample_memory.py"),
            mapping,
            str(folder),
            str(output),
            *kill,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert output.is_file(), done.stdout + done.stderr
        for moment, held in json.loads(output.read_text()).items():
            most[moment] = [max(pair) for pair in zip(held, most.get(moment, held), strict=True)]
    return most


_ONE_OF_TWO = """
import importlib, json, sys
from pathlib import Path
folder, module, name, port, rank, argument = sys.argv[1:]
sys.path.insert(0, folder)
if __name__ == "__main__":
    import jax
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    print(json.dumps(getattr(importlib.import_module(module), name)(Path(argument))))
"""


@pytest.fixture
def in_two_processes(tmp_path):
    """A function that calls another one, a module's own, in two processes of one run, and returns both values.

    Each process has two devices. The function's argument is a folder; its value goes through JSON. With another status
    than 0, which both must end with, what they say is returned.
    """

    def call(function: Callable[[Path], Any], argument: Path, status: int = 0) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        file = Path(inspect.getfile(function))
        script = tmp_path / "one_of_two.py"  # a file, so that processes can start others
        script.write_text(_ONE_OF_TWO)
        command = [sys.executable, script, file.parent, file.stem, function.__name__, str(port)]
        flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
        processes = [
            subprocess.Popen(
                [*command, str(rank), argument],
                env=os.environ | flags,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [status, status], said
        if status:
            return [errors for _, errors in said]
        return [json.loads(out.splitlines()[-1]) for out, _ in said]

    return call
