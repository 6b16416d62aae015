"""Where compiled programs are kept, and what compiling leaves."""

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf import compiled

PLACE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@pytest.fixture
def environ(monkeypatch, tmp_path):
    found = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_programs_are_kept_under_the_users_cache_by_machine(environ, tmp_path):
    compiled.keep()
    place = os.path.relpath(environ[PLACE], tmp_path).split(os.sep)
    assert place[:2] == ["jaxrlhf", "compiled"]
    assert len(place[2]) == 12
    assert os.path.isdir(environ[PLACE])
    assert float(environ[LEAST]) < 1


def test_the_users_own_settings_stay(environ):
    environ |= {PLACE: "/elsewhere", LEAST: "5"}
    compiled.keep()
    assert (environ[PLACE], environ[LEAST]) == ("/elsewhere", "5")


def test_nothing_is_kept_where_nothing_can_be_written(environ, tmp_path):
    (tmp_path / "jaxrlhf").write_text("a file stands in the way")
    compiled.keep()
    assert PLACE not in environ


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
def test_memory_that_is_free_goes_back_to_the_system():
    def held():
        return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)

    # Blocks that the allocator keeps, as what lies behind them is in use.
    between = [(np.ones(2**13), np.ones(2**7)) for _ in range(2048)]
    kept = [small for _, small in between]
    before = held()
    del between
    compiled.tidy()
    assert before - held() > 100_000  # KiB, of 131,072
    assert len(kept) == 2048
