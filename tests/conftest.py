"""What all tests rely on."""

from __future__ import annotations

import signal

# Who starts the tests in the background of a shell has them ignore Ctrl-C, and their children with
# them; tests that send it need what a user's terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
