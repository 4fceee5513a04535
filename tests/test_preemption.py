"""Signals reach the run wherever it is. What training and whole runs do then is in tests/run and tests/reliability."""

import gc
import os
import signal
import time

import pytest

from l2m_jax import preemption


class _Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def _wait() -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_signal_is_raised_at_once():
    with pytest.raises(preemption.Preempted, match="SIGTERM"), preemption.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        _wait()


def test_a_signal_within_a_garbage_collection_is_raised_after_it():
    pending = [signal.SIGINT]

    def callback(*_):
        if pending:
            os.kill(os.getpid(), pending.pop())

    gc.callbacks.append(callback)
    try:
        with pytest.raises(preemption.Preempted, match="SIGINT"), preemption.handled():
            gc.collect()
            assert not pending
            _wait()
    finally:
        gc.callbacks.remove(callback)


def test_a_signal_within_a_finaliser_is_raised_after_it():
    with pytest.raises(preemption.Preempted, match="SIGTERM"), preemption.handled():
        finalised = _Finalised()
        del finalised
        _wait()
