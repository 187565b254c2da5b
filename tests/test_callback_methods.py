"""Methods of callbacks are those of events, and can be called as such."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import shoal
from shoal.deploy.settings.load import load_config
from shoal.deploy.training.callbacks import check_callbacks, make_callbacks


class Plural(shoal.Callback):
    def on_updates(self, run: Any, update: Any) -> None: ...


class Inherits(Plural):
    def on_update(self, run: Any, update: Any) -> None: ...


class Keras(shoal.Callback):
    def on_train_batch_begin(self, batch: int) -> None: ...


class TakesTooLittle(shoal.Callback):
    def on_update(self, run: Any) -> None: ...  # type: ignore[override]  # which is the fault


class TakesTooMuch(shoal.Callback):
    def on_end(self, run: Any, summary: Any, more: Any) -> None: ...  # type: ignore[override]  # the same


class NoSelf(shoal.Callback):
    def on_start(run) -> None: ...  # type: ignore[no-untyped-def,override]  # the same


WRONG = {
    Plural: r"on_updates is no event, so it would never be called; did you mean on_update\? There are on_start, ",
    Inherits: "on_updates is no event",
    Keras: r"on_train_batch_begin is no event, so it would never be called\. There are on_start, on_update, ",
    TakesTooLittle: r"on_update must take \(self, run, update\)",
    TakesTooMuch: r"on_end must take \(self, run, summary\)",
    NoSelf: r"on_start must take \(self, run\)",
}


@pytest.mark.parametrize("cls", WRONG)
def test_a_method_that_would_never_be_called_is_refused(cls: type[shoal.Callback]) -> None:
    """Catches a misspelt event, whose method is passed over without a word, and one that fails hours later."""
    with pytest.raises(ValueError, match=rf"callbacks: .*{cls.__name__}: {WRONG[cls]}"):
        make_callbacks([], [cls()])
    config, problems = load_config([], [f"callbacks=[{{name: '{__name__}:{cls.__name__}'}}]"])
    assert not problems
    with pytest.raises(ValueError, match=WRONG[cls]):
        raise ValueError(check_callbacks(config.callbacks)[0])


def anything(*args: Any, **kwargs: Any) -> None: ...


class Unusual(shoal.Callback):
    """Everything here can be called as the event that it is named after."""

    once = 3
    online = functools.partial(anything)
    on_start = anything
    on_update = staticmethod(anything)
    on_evaluation = functools.partial(anything)  # type: ignore[assignment]  # it can be called

    @classmethod
    def on_episodes(cls, run: Any, episodes: Any, more: int = 0) -> None: ...  # type: ignore[override]  # the same

    @functools.wraps(anything)
    def on_checkpoint(self, *args: Any) -> None: ...


def test_what_can_be_called_is_taken() -> None:
    """Catches a check that knows only methods as the documentation writes them."""
    callback = Unusual()
    assert make_callbacks([], [callback, shoal.OptionsSchedule({0: {"a": 1}})])[0] is callback
