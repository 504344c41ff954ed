"""What all tests share."""

import signal

import pytest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
for number in STOP_SIGNALS:  # nohup and a shell's & have some ignored, and what the tests start would inherit that
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def restore_signals():
    """The scripts catch signals for a process of their own."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
