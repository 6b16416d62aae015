"""Several processes at one experiment: how they find each other, agree, and wait for each other with a time limit.

All of them run the same program on one mesh and one workdir. What is read from the workdir decides what is due, so host
0 looks and tells the others; host 0 alone writes (`files.writes`).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # JAX has no public name for its key-value store
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.files import Failure, UserError

Value = TypeVar("Value")
SECONDS = 600.0  # that processes may be apart where a barrier is
LATE = 60.0  # seconds after which a network's folder shows what host 0 wrote
ANSWER = 5.0  # seconds that the others have to say that they are there, when one of them may be gone
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_alone = contextvars.ContextVar("alone", default=False)  # host 0, while it decides
_calls = itertools.count()  # the same in every process, as all take the same path


def start(seconds: float = SECONDS) -> None:
    """Joins the other processes, where the environment speaks of any; must come before JAX looks for devices.

    The environment is explicit (JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or Slurm's, or
    a TPU slice's: GKE's variables, or JAXRLHF_HOSTS=auto, with which JAX asks the machine.

    Raises:
      UserError: a variable is missing or no number, or this is one host of several and nothing says so.
      Failure: with an explicit environment, names the processes that did not come within so many seconds.
    """
    env = os.environ
    if jax.distributed.is_initialized():
        return
    if any(name in env for name in _EXPLICIT):
        count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID={index}: must be from 0 to JAX_NUM_PROCESSES - 1 = {count - 1}")
        address = env.get("JAX_COORDINATOR_ADDRESS", "")
        if not address.rpartition(":")[2].isdecimal():
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT, of process 0")
        _meet(address, count, index, seconds)
        jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
    elif (
        int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or env.get("JAXRLHF_HOSTS") == "auto"
    ):
        jax.distributed.initialize()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} hosts; set JAXRLHF_HOSTS=auto on each, as launch/tpu_pod.sh does"
        )
    if together() and jax.default_backend() == "cpu":
        _greet(seconds)


def _greet(seconds: float) -> None:
    """Gloo lets processes be 30 s apart at their first collective, and as long as they like afterwards: has it now."""
    barrier("the start", seconds)
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    each = NamedSharding(mesh, PartitionSpec("all"))
    ones = jax.make_array_from_callback((mesh.size,), each, lambda _: np.ones(1, np.float32))
    jax.jit(jnp.sum)(ones).block_until_ready()


def _meet(address: str, count: int, index: int, seconds: float) -> None:
    """Waits at the coordinator's address for all processes: where one is missing, JAX would end the others unnamed."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    if index:
        return _report_to(host, int(port), index, count, until, seconds)
    calls: dict[int, socket.socket] = {}
    here = host if host in ("127.0.0.1", "localhost") else ""
    with socket.create_server((here, int(port))) as server, contextlib.ExitStack() as opened:
        while len(calls) < count - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                call = opened.enter_context(server.accept()[0])
                call.settimeout(5)
                if 0 < (caller := int(call.recv(16))) < count:
                    calls[caller] = call
        word = _missing({0, *calls}, count, seconds) if len(calls) < count - 1 else ""
        for call in calls.values():
            with contextlib.suppress(OSError):
                call.sendall(word.encode())
                call.shutdown(socket.SHUT_WR)
                call.recv(1)  # the other side closes first, so that the port is free at once
    if word:
        raise Failure(word)


def _report_to(host: str, port: int, index: int, count: int, until: float, seconds: float) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 5) as call:
            call.settimeout(max(until - time.monotonic(), 0) + 10)
            call.sendall(str(index).encode())
            if word := b"".join(iter(lambda: call.recv(4096), b"")).decode():
                raise Failure(word)
            return
        time.sleep(0.2)
    raise Failure(_missing(set(range(count)) - {0}, count, seconds))


def _missing(here: set[int], count: int, seconds: float) -> str:
    names = ", ".join(str(i) for i in range(count) if i not in here)
    if not names:
        return f"after {seconds:g} s this process is too late"
    return f"after {seconds:g} s process {names} of 0 to {count - 1} is missing; its log may say why"


def together() -> bool:
    """Whether there is another process, and this one does not work alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1 and not _alone.get()


def devices() -> list[Any]:
    """Those to work with: all, or, where host 0 works alone, its own."""
    return jax.local_devices() if _alone.get() else jax.devices()


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def barrier(name: str, seconds: float = SECONDS) -> None:
    """Waits until every process is here; `Failure` that names the missing ones when the time is up."""
    if not together():
        return
    if missing := _wait(f"jaxrlhf/barrier/{next(_calls)}", seconds):
        raise Failure(f"{name}: {missing}")


def gone(error: Exception) -> str:
    """Who does not answer, if an error is of the kind that a process meets when another one is gone; "" otherwise."""
    if not (together() and any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE"))):
        return ""
    missing = _wait("jaxrlhf/gone", ANSWER)
    return f"{missing} ({str(error).splitlines()[0]}); the same command goes on" if missing else ""


def _wait(place: str, seconds: float) -> str:
    """Waits at a barrier; says who is missing when the time is up, or "" when all came."""
    client = _client()
    try:
        client.key_value_set(f"{place}/{jax.process_index()}", "here")
        client.wait_at_barrier(place, int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        try:
            here = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(place)}
        except jax.errors.JaxRuntimeError:
            return "host 0 cannot be reached any more; its log may say why"
        return _missing(here, jax.process_count(), seconds)
    return ""


def shared(path: Path) -> None:
    """`UserError` if this host never sees a file that host 0 wrote."""
    until = time.monotonic() + LATE
    while not path.exists():
        if time.monotonic() > until or not together():
            raise UserError(f"{path}: this host does not see what host 0 wrote; name a folder that all share")
        time.sleep(0.5)


def decided(work: Callable[[], Value]) -> Value:
    """What `work` gives or raises on host 0, which does it alone, on every host; a JSON value.

    Models that it runs are on host 0's devices. However long it takes: a host 0 that dies ends the others, whose
    heartbeats find it gone.

    Raises:
      UserError, Failure: whatever of these `work` raised, on every host.
    """
    if not together():
        return work()
    client, key = _client(), f"jaxrlhf/decided/{next(_calls)}"
    if jax.process_index() > 0:
        return _outcome(client, key)
    try:
        with _by_itself():
            value = work()
    except (UserError, Failure) as error:
        client.key_value_set(key, json.dumps({type(error).__name__: str(error)}))
        raise
    except BaseException:
        client.key_value_set(key, json.dumps({"Failure": "host 0 failed; its log says why"}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def first_then_all(work: Callable[[], Value]) -> Value:
    """`work` on host 0, and when it is done, on the others, which find what host 0 wrote."""
    done: list[Value] = []
    decided(lambda: done.append(work()))
    return done[0] if done else work()


def _client() -> Any:
    return distributed.global_state.client


def _outcome(client: Any, key: str) -> Any:
    while True:
        try:
            found = json.loads(client.blocking_key_value_get(key, 60_000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise Failure(f"host 0 cannot be reached any more ({str(error).splitlines()[0]})") from None
    for kind in (UserError, Failure):
        if kind.__name__ in found:
            raise kind(found[kind.__name__])
    return found["value"]


def _number(name: str) -> int:
    if not os.environ.get(name, "").isdecimal():
        raise UserError(
            f"{name}={os.environ.get(name, '')}: must be a whole number; {', '.join(_EXPLICIT)} go together"
        )
    return int(os.environ[name])
