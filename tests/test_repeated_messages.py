"""Messages that come again and again: the first of each kind are shown, the others counted, and none is lost."""

from __future__ import annotations

import logging

import pytest
from shoal.learner.repeated_messages import EVERY_SECONDS, SHOWN, RepeatedMessages

log = logging.getLogger("shoal.test_repeated_messages")


def fault(number: int, what: str = "no ROM") -> str:
    return f"E: slot {number % 7}, step {number} (seed {number * 31}), step with action {number % 4}: {what} (e.py:30)"


def test_a_fault_of_every_episode_fills_no_screen(caplog: pytest.LogCaptureFixture) -> None:
    """Catches 656 warnings of one fault; a second fault that is hidden behind the first; and a count that lies."""
    now = 0.0
    messages = RepeatedMessages("faults of environments", log, clock=lambda: now)
    for number in range(1000):
        now = number / 4  # 250 s
        messages.add([fault(number), fault(number, "at 0x7f3d07470d60")] if number % 2 else [fault(number)])
    messages.add([fault(1, "another one")])
    messages.count()
    said = [record.getMessage() for record in caplog.records]
    shown = [line for line in said if " more faults of environments" not in line]
    counted = [line for line in said if line not in shown]
    assert len(shown) == 2 * SHOWN + 1
    assert [line.endswith("(more of this kind are counted)") for line in shown].count(True) == 2
    assert shown[-1] == fault(1, "another one")
    assert len(counted) == 250 // EVERY_SECONDS + 1
    more = [int(line.split(" ", 1)[0]) for line in counted]
    assert sum(more) + len(shown) == 1501
    assert "1501 in all; the last: E: slot" in counted[-1]
    messages.count()
    assert len(caplog.records) == len(said)


def test_texts_of_any_kind_take_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a table that grows with every message, and as many lines."""
    messages = RepeatedMessages("faults", log, clock=lambda: 0.0)
    for number in range(2000):
        letters = str(number).translate(str.maketrans("0123456789", "abcdefghij"))
        messages.add([f"{letters} is not a number"])
    assert len(caplog.records) < 100
    messages.count()
    assert "2000 in all" in caplog.records[-1].getMessage()
