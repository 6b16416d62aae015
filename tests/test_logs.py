"""Progress for who waits: in a log, a bar that comes late says its first line when it comes."""

import pytest

from jaxrlhf import logs


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns; returns how."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(logs.tqdm, "monitor_interval", 0)

    def turn(seconds):
        now[0] += seconds

    return turn


def lines(capfd, clock, jobs, seconds, delay):
    bar = logs.progress("measuring", jobs, delay=delay)
    for _ in range(jobs):
        clock(seconds)
        bar.update()
    bar.close()
    return [line.split("|")[0].strip() for line in capfd.readouterr().err.splitlines()]


def test_what_takes_longer_than_the_delay_shows_in_a_log(capfd, clock):
    assert lines(capfd, clock, 7, 1.0, 2) == ["measuring:  29%"]


def test_after_its_first_line_a_log_has_one_every_ten_seconds(capfd, clock):
    assert lines(capfd, clock, 25, 1.0, 2) == ["measuring:   8%", "measuring:  48%", "measuring:  88%"]


def test_what_is_done_at_once_says_nothing(capfd, clock):
    assert lines(capfd, clock, 5, 0.3, 2) == []
