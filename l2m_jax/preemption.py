"""Ends a run on SIGTERM or SIGINT with nothing lost: training saves after the step in flight, and then ends.

Schedulers announce the end of a job by SIGTERM (SLURM, Kubernetes, spot instances), people by Ctrl-C. Work whose
results are kept as they come (generation, the teacher store) ends at once.
"""

# jax takes seconds to import, and signals are handled from the start, so it is imported where it is needed.

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again

# With several processes all stop after the same step: this many steps after the one that the first signal interrupted.
# A process is at most 2 steps ahead of another, because it reads the metrics of step n - 1 after it has started step n.
_STEPS_AHEAD = 3
_STOP, _STOP_NOW, _ENDED = "l2m_jax/stop_after_step", "l2m_jax/stop_now", "l2m_jax/ended"

_AGAIN = 0.05  # seconds after which a signal is sent again that came where Python ignores exceptions
_SAME = 1.0  # seconds in which a signal counts as the same: `timeout`, say, sends it twice
_SECONDS_BETWEEN_LOOKS = 1.0  # for a signal that another process has raised
_PATIENCE = 5.0  # seconds in which the other processes end before the first one, which serves them

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(KeyboardInterrupt):
    """The run was asked to end and can be resumed."""


_deferred = False  # whether a signal is noted instead of raised
_noted: str | None = None  # the name of the signal
_noted_at = 0.0
_raised = False  # whether the signal was raised at once, in this process only
_follower: threading.Thread | None = None
_over = threading.Event()  # ends the follower
_hook_before = sys.unraisablehook


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Preempted` within the block, or are noted within `deferred`.

    A second signal ends the process immediately. Outside the main thread, signals keep their handlers. An exception that
    follows from the end of another process after a signal ends this one as that signal does.
    """
    global _noted, _raised, _hook_before
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in _SIGNALS}
    _hook_before, sys.unraisablehook = sys.unraisablehook, _on_ignored
    _noted, _raised = None, False
    _over.clear()
    try:
        yield
    except Exception:
        # A process that ends closes its connections, which may fail here before the follower has looked.
        if _follower is not None and (name := _stopped_by()) is not None:
            _end_after(name)
        raise
    finally:
        _over.set()
        if _follower is not None:
            # A thread that Python ends within a call of the coordination service would abort the process.
            _follower.join()
        sys.unraisablehook = _hook_before
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, _) -> None:
    global _noted, _noted_at, _raised
    if _noted is not None:
        if time.monotonic() - _noted_at < _SAME:
            return
        os._exit(EXIT_STATUS)  # an exception could wait for a checkpoint that is being written
    _noted, _noted_at = signal.Signals(number).name, time.monotonic()
    if not _deferred:
        _raised = True
        raise Preempted(_noted)
    print(f"\n{_noted}: the run saves and ends after this step", file=sys.stderr, flush=True)


def _on_ignored(ignored: "sys.UnraisableHookArgs") -> None:
    """Sends a signal again that came where Python ignores exceptions: in finalisers and callbacks, such as jax has them."""
    global _noted, _raised
    if not isinstance(ignored.exc_value, Preempted):
        _hook_before(ignored)
        return
    number = signal.Signals[str(ignored.exc_value)]
    _noted, _raised = None, False
    threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Notes signals within the block, for `requested`. One that no `requested` answered is raised at the end."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _several_processes():
        from l2m_jax import multihost

        if _noted is not None:
            requested(0)  # no step followed the signal, so the others do not know of it
        multihost.first(lambda: None)  # so that all processes read the same
        if _agreed_step() is not None:
            raise Preempted
    elif _noted is not None:
        raise Preempted(_noted)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within `deferred`: a signal raises `Preempted` within this block, or at its start if it was noted before.

    With several processes it does not: the others would wait for this one in the middle of their work.
    """
    global _deferred
    if not _deferred or _several_processes():
        yield
        return
    if _noted is not None:
        raise Preempted(_noted)
    _deferred = False
    try:
        yield
    finally:
        _deferred = True


def requested(step: int) -> bool:
    """Whether to save after `step` and end. The same in all processes, which must ask after each step."""
    if not _several_processes():
        return _noted is not None
    import jax

    agreed = _agreed_step()
    if agreed is None and _noted is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
            _key_value_store().key_value_set(_STOP, str(step + _STEPS_AHEAD))
        agreed = _agreed_step()
    return agreed is not None and step >= agreed


def end_others() -> None:
    """Ends the other processes after a signal that only this one has raised, and then this one.

    They may wait for it in the middle of their work, and their results are kept as they come.
    """
    if not _raised or not _several_processes():
        return
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _key_value_store().key_value_set(_STOP_NOW, str(_noted), True)
        _leave()
    os._exit(EXIT_STATUS)


def follow() -> None:
    """Ends this process when `end_others` is called in another one. Call it once the processes have met."""
    global _follower
    if _several_processes():
        _follower = threading.Thread(target=_follow, daemon=True)
        _follower.start()


def _follow() -> None:
    while not _over.wait(_SECONDS_BETWEEN_LOOKS):
        if (name := _stopped_by()) is not None:
            _end_after(name)


def _stopped_by() -> str | None:
    """The name of the signal with which another process has called `end_others`."""
    return _value_of(_STOP_NOW)


def _end_after(name: str) -> NoReturn:
    """Ends this process after a signal in another one."""
    import jax

    print(f"{name} in another process: run the same command again to resume", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _leave()
    os._exit(EXIT_STATUS)


def _leave() -> None:
    """The first process leaves last: the others would abort without it."""
    import jax

    if jax.process_index() != 0:
        _key_value_store().key_value_set(f"{_ENDED}/{jax.process_index()}", "ended", True)
        return
    for other in range(1, jax.process_count()):
        _key_value_store().blocking_key_value_get(f"{_ENDED}/{other}", int(1000 * _PATIENCE))


def _agreed_step() -> int | None:
    found = _value_of(_STOP)
    return None if found is None else int(found)


def _value_of(key: str) -> str | None:
    import jax

    try:
        return _key_value_store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # no such key
        return None


def _several_processes() -> bool:
    import jax

    return jax.process_count() > 1


def _key_value_store() -> Any:
    """The store of JAX's coordination service, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client
