"""For all tests: SIGINT raises KeyboardInterrupt, also where a shell that starts them in the background ignores it."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
