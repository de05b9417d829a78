"""Signals that ask a process to end: what is put off, and what is passed over."""

import signal

import pytest

from mlx_rsgwm.core.signals import deferred_interrupts, handled


def test_a_hangup_that_comes_twice_interrupts_no_step():
    """From the shell and from the system; a second Ctrl-C does."""
    with deferred_interrupts() as interruption:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_interrupts() as interruption, handled((signal.SIGHUP,), lambda *_: pytest.fail("handled")):
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)
