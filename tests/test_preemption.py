"""Signals reach the run wherever it is. What training and whole runs do then is in tests/run and tests/reliability."""

import argparse
import gc
import os
import signal
import sys
import time
import weakref

import jax
import numpy as np
import pytest

from l2m_jax import preemption
from l2m_jax.cli import common


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


def test_a_signal_within_the_callback_of_a_weak_reference_is_raised_after_it():
    with pytest.raises(preemption.Preempted, match="SIGTERM"), preemption.handled():
        referred = {1}
        reference = weakref.ref(referred, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del referred
        assert reference() is None
        _wait()


def test_other_exceptions_that_are_ignored_are_reported_as_before(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: reported.append(ignored.exc_type))
    with preemption.handled():
        referred = {1}
        reference = weakref.ref(referred, lambda _: 1 / 0)
        del referred
    assert reference() is None and reported == [ZeroDivisionError]


def gather_until_one_is_asked_to_end(_folder) -> None:
    """A command in one of two processes: the second is asked to end while the first waits for it."""
    from jax.experimental import multihost_utils

    def command(_options: argparse.Namespace) -> None:
        preemption.follow()
        multihost_utils.process_allgather(np.zeros(1, np.int32))
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        multihost_utils.process_allgather(np.zeros(2, np.int32))

    preemption._SECONDS_BETWEEN_LOOKS = 60.0  # so that the broken connection is noticed first
    common.run(common.Parser("train", "A test."), command, [])


def test_a_connection_that_a_signal_has_closed_ends_the_other_process_as_the_signal_does(
    in_two_processes, tmp_path
):
    waiting, asked = in_two_processes(gather_until_one_is_asked_to_end, tmp_path, preemption.EXIT_STATUS)
    assert "SIGTERM in another process: run the same command again" in waiting
    assert "Traceback" not in waiting and "ended by a signal" in asked
