r"""One command as several processes on this machine, which find each other as hosts of a cluster do.

    python launch/local.py -n 2 [--devices-per-process=4] -- \
        jaxrlhf run --config=configs/quickstart.py --workdir=runs/two

Each process has so many simulated CPU devices, unless JAX_PLATFORMS names another platform. What process 0 says is
passed on; of another one, its last lines, if it fails first and process 0 not likewise. Ctrl-C and SIGTERM go to all.
When one fails, the others are ended, and its exit status is this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

TAIL = 30  # lines
GRACE = 10.0  # seconds that the others have to end as well, or to say who is missing


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status of the first process that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="K")
    parser.add_argument("command", nargs="+", help="after --")
    c = parser.parse_args(argv)
    if c.n < 1 or c.devices_per_process < 1:
        parser.error("-n and --devices-per-process are 1 or more")
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(c.n - 1)]
        processes: list[subprocess.Popen] = []
        # As SIGINT, which is heard between stages as well; JAX has SIGTERM for itself. Before the processes start, who
        # would ignore SIGINT for ever if this one was started so, as shells start what runs in the background.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _send(processes, signal.SIGINT))
        try:
            _start(processes, c.command, c.n, c.devices_per_process, logs)
        except OSError as error:
            parser.error(f"{c.command[0]}: {error.strerror}")
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        failed = _wait(processes)
        if failed is None:
            return 0
        status = processes[failed].returncode
        if processes[0].returncode != status:
            _tell(failed, logs[failed - 1])
        if status < 0:
            print(f"[process {failed}] ended by {signal.Signals(-status).name}", file=sys.stderr)
    return status if status > 0 else 128 - status


def _start(
    processes: list[subprocess.Popen], command: list[str], count: int, devices: int, logs: Sequence[IO[bytes]]
) -> None:
    """Appends each process as it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    for i in range(count):
        env = os.environ | shared | {"JAX_PROCESS_ID": str(i)}
        out = {"stdout": logs[i - 1], "stderr": subprocess.STDOUT} if i else {}
        # A session of its own, so that Ctrl-C reaches it once: from here.
        processes.append(subprocess.Popen(command, env=env, start_new_session=True, **out))


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Waits for all; the index of the first that failed, after which the others are ended, or None."""
    while True:
        statuses = [p.poll() for p in processes]
        failed = [i for i, status in enumerate(statuses) if status]
        if failed:
            until = time.monotonic() + GRACE
            while time.monotonic() < until and any(p.poll() is None for p in processes):
                time.sleep(0.05)
            _send(processes, signal.SIGKILL)
            for p in processes:
                p.wait()
            return failed[0]
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for p in processes:
        if p.poll() is None:
            p.send_signal(number)


def _tell(index: int, log: IO[bytes]) -> None:
    log.seek(0)
    for line in log.read().decode(errors="replace").splitlines()[-TAIL:]:
        print(f"[process {index}] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
