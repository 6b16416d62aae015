"""Being asked to stop: Ctrl-C, SIGTERM, and notices of maintenance, read once a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from jaxrlhf.files import Stopped
from jaxrlhf.logs import say


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Where no step is under way, Ctrl-C and SIGTERM end the process at once, with exit status 0.

    All that stages write is whole or not there, so that this loses nothing. An exception could: one raised within a
    callback of XLA's is printed and forgotten.
    """
    with _heard((signal.SIGINT, signal.SIGTERM), lambda _: _leave(0, "stopped; the same command goes on")):
        yield


@contextlib.contextmanager
def notices() -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether to save and stop there; a second Ctrl-C ends the process at once.

    Where JAX's processes work together, JAX hears SIGTERM and a TPU's notices, and names one step to all of them. In
    a thread other than the main one nothing is heard.

    Raises:
      Stopped: at the context's end, if the request came after the last step.
    """
    import jax  # here, so that a command hears before it has imported this
    from jax.experimental import multihost_utils

    together, asked, heeded = jax.distributed.is_initialized(), threading.Event(), False

    def reached(step: int) -> bool:
        nonlocal heeded
        heeded = multihost_utils.reached_preemption_sync_point(step) if together else asked.is_set()
        return heeded

    numbers = (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM)
    with _heard(numbers, lambda number: _notice(number, asked, together)):
        yield reached
    if asked.is_set() and not heeded and not together:  # together, the next stage stops at a step that JAX names
        raise Stopped("stopped after the last step, saved; the same command goes on")


def _notice(number: int, asked: threading.Event, together: bool) -> None:
    if asked.is_set():
        if number == signal.SIGINT:
            _leave(1, "stopped at once; the same command goes on from the last checkpoint")
        return
    asked.set()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    say(f"{name}: saving after this step; Ctrl-C {'again ' if name == 'Ctrl-C' else ''}stops at once")
    if together:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes


def _leave(status: int, word: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{word}\n".encode())
    os._exit(status)


@contextlib.contextmanager
def _heard(numbers: tuple[int, ...], handle: Callable[[int], None]) -> Iterator[None]:
    """Calls `handle` in a thread for each signal: Python's own handlers would wait for XLA to return."""
    # Whoever started us with a signal ignored, as nohup does, wants it ignored.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def hear() -> None:
        while byte := os.read(reader, 1):
            if byte[0] in before:
                handle(byte[0])

    thread = threading.Thread(target=hear, name="signals", daemon=True)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for n in before:
        signal.signal(n, lambda *_: None)
    thread.start()
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler or signal.SIG_DFL)  # None where it was not set from Python
        signal.set_wakeup_fd(outer)
        os.close(writer)
        thread.join()
        os.close(reader)
