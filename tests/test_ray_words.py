"""What Ray says of a process that ended, in a line."""

from __future__ import annotations

import pytest
from shoal.actors.ray_words import MOST_CHARACTERS, in_short

GONE = """The actor died unexpectedly before finishing this task.
	class_name: RolloutActor
	actor_id: 7278c57d2b624c7f3506f4f401000000
	pid: 26068
	namespace: e2a04e44-d23b-4330-95f5-650f039be509
	ip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: {} Worker exit detail: {}"""
NO_WORD = (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the "
    "worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)


class Died(Exception):
    pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GONE.format("SYSTEM_ERROR", NO_WORD), "its process 26068 ended without an exception: it crashed, was killed"),
        (
            GONE.format("INTENDED_SYSTEM_EXIT", "Worker exits because its node\n is drained."),
            "its process 26068 ended (INTENDED_SYSTEM_EXIT): Worker exits because its node is drained.",
        ),
        ("slot 3, step 9: ValueError: no ROM (e.py:3)", "Died: slot 3, step 9: ValueError: no ROM (e.py:3)"),
        ("several\n\nlines   of text", "Died: several lines of text"),
    ],
)
def test_a_page_becomes_a_line(text: str, said: str) -> None:
    """Catches seven lines of Ray's own matters on the screen, and a cause of another kind that is cut out with them."""
    found = in_short(Died(text))
    assert found.startswith(said)
    assert "\n" not in found
    assert "actor_id" not in found
    assert len(found) <= MOST_CHARACTERS


def test_a_long_error_keeps_its_beginning() -> None:
    """Catches a traceback of pages in one line."""
    assert len(in_short(Died("x " * 5000))) == MOST_CHARACTERS
