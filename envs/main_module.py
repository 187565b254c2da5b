"""Start processes that do not import the main module of this one."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Keep processes that are started in the block from importing the main module.

    In an actor this would import Ray, and in a user's script it would run the script again. The processes do not need
    it: definitions in the main module are pickled by value.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
