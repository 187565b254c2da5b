"""Errors that tell of several things at once."""

from __future__ import annotations


class Problems(ValueError):
    """Everything that is wrong, one argument each; its text has them one after the other."""

    def __str__(self) -> str:
        """All of them, each beginning on a line of its own."""
        return "\n".join(map(str, self.args))


def problems_of(error: BaseException) -> list[str]:
    """Each problem that an error tells of, which may have several lines: other people's messages do."""
    return [str(each) for each in error.args] if isinstance(error, Problems) else [str(error)]
