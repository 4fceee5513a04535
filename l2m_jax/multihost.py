"""Several processes, one per host: how they find each other, and what the first one does for all.

All run the same program on the same files. The first process writes, and decides what depends on files that are being
written (is this artefact finished?). `first` does both.
"""

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from l2m_jax.errors import InputError, require_at_least, require_choice, require_positive
from l2m_jax.progress import console

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """The devices of a run, and how its processes find each other. Changes only cost and rounding.

    Raises:
        InputError: a value outside its range.
    """

    mapping: str = "pmap"  # "pmap" (replicated) or "fsdp" (sharded parameters)
    count: int = 0  # 0: all
    slots: int = 0  # sequences decoded at once on each device; 0: chosen from the model's size
    coordinator: str = ""  # host:port of process 0; empty: from the environment, or one process
    num_processes: int = (
        0  # 0: from the environment (SLURM, Open MPI, Kubernetes, TPU pods); 1: only this one
    )
    process_id: int = -1  # 0, 1, ...; -1: from the environment
    timeout: int = 300  # seconds that processes wait for each other at the start
    deterministic: bool = False  # two runs on GPUs of one kind are equal bit for bit, and slower

    def __post_init__(self):
        require_choice(self, "mapping", ("pmap", "fsdp"))
        require_at_least(self, 0, "count", "slots", "num_processes")
        require_at_least(self, -1, "process_id")
        require_positive(self, "timeout")
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdigit():
            raise InputError(f"coordinator: {self.coordinator!r} is not host:port, as in 'node1:12345'")
        if self.process_id >= self.num_processes > 0:
            raise InputError(
                f"process_id: {self.process_id} is not below num_processes {self.num_processes}; ranks start at 0"
            )


DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_SILENCE = 100  # seconds without a heartbeat from a process until the others end: JAX's default
_LONGEST_WORK = (
    7 * 24 * 3600
)  # seconds that the others wait for the first process, which sends heartbeats meanwhile
_ADDED_TOGETHER = 1 << 18  # numbers of each process, in `total`
_barriers = itertools.count()
_working = False  # whether the first process is in `first`


def start(devices: Devices) -> None:
    """Joins the processes of this run, if it has several. Call it before anything that uses a device.

    Address, count and rank come from `devices`, or from the environment as JAX detects it: SLURM, Open MPI, Kubernetes
    (with the package `kubernetes`), a TPU pod. Without either, this is the only process.

    Raises:
        InputError: settings that do not fit together. If the others cannot be reached within `devices.timeout` seconds,
            the process ends with a message, where JAX would abort.
    """
    use_deterministic_kernels(devices)
    address = devices.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if devices.num_processes == 1 or jax.distributed.is_initialized():
        return
    gives_up = threading.Timer(devices.timeout, _give_up, (address, devices.timeout))
    gives_up.daemon = True
    gives_up.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `preemption`
    silence = min(devices.timeout, _SILENCE)
    try:
        jax.distributed.initialize(
            address,
            devices.num_processes or None,
            devices.process_id if devices.process_id >= 0 else None,
            # JAX would give a task of SLURM or Open MPI only one device. Here it has the whole host.
            local_device_ids=None if "JAX_LOCAL_DEVICE_IDS" in os.environ else (),
            initialization_timeout=devices.timeout + 60,
            heartbeat_timeout_seconds=silence,
            shutdown_timeout_seconds=silence,
        )
    except (ValueError, RuntimeError) as error:
        asked = address is not None or devices.num_processes or devices.process_id >= 0
        if not asked and "coordinator_address" in str(error):
            return  # the environment mentions no other processes
        raise InputError(
            f"config.devices: {str(error).rstrip('.')}; set coordinator (host:port), num_processes and process_id, or "
            "num_processes=1 for a single process"
        ) from error
    finally:
        gives_up.cancel()
    console.quiet = jax.process_index() != 0
    console.print(f"{jax.process_count()} processes, {jax.device_count()} × {jax.devices()[0].device_kind}")


def use_deterministic_kernels(devices: Devices) -> None:
    """Sets the flag of `devices.deterministic`. Call it before anything that uses a device.

    Sums then need no atomic additions, also in cuDNN's attention, and kernels are not chosen by measured times.
    """
    if devices.deterministic and not is_deterministic():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def is_deterministic() -> bool:
    """Whether XLA is told to use deterministic kernels only."""
    return DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()


def _give_up(address: str | None, seconds: int) -> None:
    print(
        f"error: config.devices.coordinator: the processes of this run did not all meet at "
        f"{repr(address) if address else 'the address from the environment'} within {seconds} s; check the address, "
        "that every process was started, and that no firewall or proxy (http_proxy) is in between, or raise "
        "config.devices.timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_first() -> bool:
    """Whether this is the first process, which writes for all."""
    return jax.process_index() == 0


def first(work: Callable[[], T]) -> T:
    """Runs `work()` in the first process only. Returns its value, or raises its exception, in all processes.

    All processes call it together. The others wait, so that afterwards they find what the first one wrote.

    Args:
        work: returns a value that JSON can hold, without tuples. An exception other than InputError reaches the other
            processes as RuntimeError.

    Raises:
        RuntimeError: called within `work`, where the others would wait forever.
    """
    global _working
    if _working:
        raise RuntimeError("first() is called within first(): with several processes it would never return")
    value: str | None = None
    error: Exception | None = None
    if is_first():
        _working = True
        try:
            # As JSON even with a single process, so that its type does not depend on the number of processes.
            value = json.dumps(work())
        except Exception as raised:
            error = raised
        finally:
            _working = False
    if jax.process_count() > 1:
        _wait()
        said = [value, None if error is None else str(error) or repr(error), isinstance(error, InputError)]
        value, message, is_input_error = json.loads(_from_first(json.dumps(said)))
        if message is not None and error is None:
            error = InputError(message) if is_input_error else RuntimeError(f"the first process: {message}")
    if error is not None:
        raise error
    assert value is not None
    return json.loads(value)


def every_process(work: Callable[[], None]) -> None:
    """Runs `work()`, which is another part in each process, in all of them together. They wait for the last one.

    If some raise, all processes raise: those that did, their own exception; the others, that of the first that did.

    Args:
        work: communicates with no other process.

    Raises:
        RuntimeError: as `first`.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        _wait()
        said = None if error is None else [str(error) or repr(error), isinstance(error, InputError)]
        for process, text in enumerate(_from_all(json.dumps(said))):
            if error is None and (of_another := json.loads(text)) is not None:
                message, is_input_error = of_another
                error = (
                    InputError(message) if is_input_error else RuntimeError(f"process {process}: {message}")
                )
    if error is not None:
        raise error


def share(work: Iterable[T]) -> Iterator[T]:
    """This process's part of `work`, which is the same in all: every n-th piece of n processes."""
    return itertools.islice(work, jax.process_index(), None, jax.process_count())


def total(values: np.ndarray) -> np.ndarray:
    """The sum of float64 arrays [N] over all processes, which call it together. It is not rounded to float32."""
    if jax.process_count() == 1:
        return values
    summed = np.empty_like(values)
    for start in range(0, len(values), _ADDED_TOGETHER):
        part = slice(start, start + _ADDED_TOGETHER)
        # As pairs of uint32: JAX would round float64.
        gathered = multihost_utils.process_allgather(values[part].view(np.uint32))
        summed[part] = np.ascontiguousarray(gathered).view(np.float64).sum(0)
    return summed


def _wait() -> None:
    """Waits until all processes are here. A device collective would time out after half a minute."""
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"l2m_jax_{next(_barriers)}", timeout_ms=1000 * _LONGEST_WORK)


def _from_first(text: str) -> str:
    """The first process's `text`, in all processes."""
    data = np.frombuffer(text.encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << (size - 1).bit_length(), np.uint8)  # few sizes, so few compilations
    padded[: len(data)] = data
    return multihost_utils.broadcast_one_to_all(padded)[:size].tobytes().decode()


def _from_all(text: str) -> list[str]:
    """The `text` of each process, in all processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.atleast_1d(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # few sizes, so few compilations
    padded[: len(data)] = data
    found = multihost_utils.process_allgather(padded)
    return [found[process, :size].tobytes().decode() for process, size in enumerate(sizes)]
