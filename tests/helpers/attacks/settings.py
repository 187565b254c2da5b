"""Settings: files in YAML, ``key=value`` arguments and mappings of Python."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from shoal.deploy.doctor import preflight
from shoal.deploy.library.config import make_config
from shoal.deploy.settings.load import CONFIGS, ConfigError, _all_paths, load_config, resolve, to_dict, to_yaml
from shoal.deploy.settings.sections import Config

from attacks import Attack
from attacks.edits import byte_edits, edited, scalars, texts, tree_edited, tree_edits, values

SHIPPED = tuple(sorted(CONFIGS.glob("*.yaml")))
PATHS = tuple(_all_paths())
COMMON = ("metrics.port=-1", "mode=inline", "env.id=recall")
"""So that the checks before a start look for no Ray and no port, and make no large environment."""

_paths = st.sampled_from(PATHS) | st.lists(texts, min_size=1, max_size=4).map(".".join)
_words = st.sampled_from(
    ("auto", "true", "null", "~", "[]", "{}", "1e3", "1_000", "0x10", ".inf", ".nan", "-0", "9" * 400, "1e400")
)
_written = (
    _words
    | values.map(lambda value: json.dumps(value, allow_nan=True))
    | st.text(max_size=30)
    | st.sampled_from(
        ("{a: *b}", "&a [*a]", "!!python/object:os.system x", "? [1]\n: 2", "- " * 40, "[" * 5000, "{" * 300)
    )
)
_arguments = st.lists(st.tuples(_paths, _written).map("=".join) | st.text(max_size=40), max_size=4)


class Settings:
    """What is given to ``shoal train`` and ``shoal.train``."""

    attacks = st.fixed_dictionaries(
        {},
        optional={
            "base": st.integers(0, len(SHIPPED) - 1),
            "tree": tree_edits,
            "bytes": byte_edits,
            "text": st.text(max_size=200),
            "arguments": _arguments,
            "mapping": st.dictionaries(_paths, values, max_size=3),
            "keyword": st.tuples(st.sampled_from(PATHS), scalars).map(list),
            "preflight": st.just(True),
        },
    )

    def __init__(self, directory: Path) -> None:
        self._file, self._run_dir = directory / "settings.yaml", directory / "run"

    def attempt(self, attack: Attack) -> str:
        """Read the settings in every way that the attack has one for."""
        files = [self._file] if self._write(attack) else []
        arguments = attack.get("arguments", [])
        config, problems = load_config(files, arguments)
        self._check(config, problems)
        outcome = "refused" if problems else "taken"
        if "mapping" in attack:
            self._check(*resolve(attack["mapping"]))
            with contextlib.suppress(ConfigError):
                assert isinstance(make_config(attack["mapping"]), Config)
        if "keyword" in attack:
            with contextlib.suppress(ConfigError):
                assert isinstance(make_config(dict([attack["keyword"]])), Config)
        if attack.get("preflight"):
            config, problems = load_config(files, [*arguments, *COMMON])
            if not problems:
                found = preflight.check(config, self._run_dir)
                assert all(isinstance(each, str) and each for each in found)
                assert not self._run_dir.exists(), "a check wrote a file"
        return outcome

    def _write(self, attack: Attack) -> bool:
        if "text" in attack:
            data = attack["text"].encode("utf-8", "surrogatepass")
        elif "base" in attack:
            tree = tree_edited(yaml.safe_load(SHIPPED[attack["base"]].read_text()), attack.get("tree", ()))
            # JSON is YAML, and writes what is no text, too.
            data = json.dumps(tree).encode()
        else:
            return False
        self._file.write_bytes(edited(data, attack.get("bytes", ())))
        return True

    def _check(self, config: Any, problems: list[str]) -> None:
        assert isinstance(config, Config)
        assert all(isinstance(problem, str) and problem for problem in problems)
        assert len(problems) < 400
        "\n".join(problems).encode("utf-8", "backslashreplace")
        again = self._file.with_name("again.yaml")
        again.write_text(to_yaml(config), encoding="utf-8", errors="surrogatepass")
        if not problems:
            read, problems = load_config([again], [])
            assert not problems, f"what it wrote is refused: {problems}"
            assert _same(to_dict(read), to_dict(config))


def _same(one: Any, other: Any) -> bool:
    """Equal as a file gives them back: tuples are lists there."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Settings]:
    """Files of settings are written to ``directory``."""
    import torch  # noqa: F401  (the checks before a start import it, which is no part of an attack)

    yield Settings(directory)
