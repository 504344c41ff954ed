"""What all tests share."""

import signal

import pytest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it, and what tests start would inherit that
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def restore_signals():
    """The scripts catch signals for a process of their own."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
