"""README and the site say what is there: tests, files, commands, settings, metrics, messages, public names."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import shoal
import yaml
from documents import DOCS, HOW, PAGES, ROOT, Block, blocks, commands
from shoal.deploy.cli import _parser
from shoal.deploy.docs import pictures
from shoal.deploy.docs.settings_reference import MARKER, settings_reference
from shoal.deploy.monitoring.catalogue import CATALOGUE, INFO
from shoal.deploy.settings.load import _all_paths, load_config
from shoal.deploy.settings.sections import Config

TESTS = ROOT / "tests"
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
SECTIONS = [
    *("actor", "checkpoint", "cluster", "env", "evaluation", "learner", "log", "metrics", "policy", "recorder"),
    "self_play",
]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
BY_NAME = {page.name: page for page in PAGES}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def spans(page: Path) -> list[str]:
    """The code in the prose and tables of a page."""
    prose = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pages
def test_a_test_that_proves_something_exists(page: Path) -> None:
    """Catches a proof that was renamed or deleted, and is still promised."""
    for span in spans(page):
        if named := re.fullmatch(r"(?:tests/(?:service/)?)?(test_\w+\.py)(?:::(\w+))?", span):
            [path] = [path for folder in (TESTS, TESTS / "service") if (path := folder / named[1]).is_file()]
            assert f"def {named[2]}(" in path.read_text() or not named[2], span


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    """Catches a link, a picture or a path that leads nowhere; the build also checks places within pages."""
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", TEXT[page]):
        assert (page.parent / "".join(link)).exists(), link
    written = {"deploy/monitoring/prometheus/targets/runs.json"}
    for span in spans(page):
        if re.fullmatch(r"(?:actors|deploy|envs|learner|policy|tests)/[\w./-]+", span) and span not in written:
            assert (ROOT / span).exists(), span


def test_every_block_says_how_it_is_checked() -> None:
    """Catches a comment that is misspelt, a reason that is missing, and a block that no test looks at."""
    known = {"bash", "python", "yaml", "text"}
    for block in BLOCKS:
        assert block.language in known or block.language.startswith("{"), block.place
        assert block.how in ("", *HOW), f"{block.place}: {block.how}"
        assert not block.how or block.what, block.place
    for page, text in TEXT.items():
        comments = re.findall(r"^<!-- ([a-z ]+):", text.replace(MARKER, ""), re.M)
        comments = [how for how in comments if how not in ("begin", "end")]
        assert len(comments) == sum(bool(block.how) for block in blocks(page)), page.name


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_real(block: Block) -> None:
    """Catches an option, a setting, a module or a target that a page names and nobody has, also where it is not run."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    found = list(commands(block.code))
    assert found
    for words in found:
        if Path(words[0]).name == "shoal":
            options = _parser().parse_args(words[1:])
            if hasattr(options, "settings") and block.how != "fails":
                files = [
                    file for file in options.config if (ROOT / "deploy/settings/configs" / f"{file}.yaml").exists()
                ]
                assert load_config(files, options.settings)[1] == []
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a command and of those below it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)


@pages
def test_settings_and_options_in_the_prose_exist(page: Path) -> None:
    """Catches a setting or an option that was renamed, or never was."""
    known = dict.fromkeys(_all_paths())
    sections = {path.rpartition(".")[0] for path in known} | {"callbacks"}
    entries = ("env.kwargs", "learner.schedules", "policy.components", "learner.loss_kwargs")
    entries += ("policy.image_encoder", "cluster.actor_labels", "cluster.learner_labels")
    options = set(options_of(_parser()))
    for span in spans(page):
        for name in re.findall(rf"(?<![\w/.-])((?:{'|'.join(SECTIONS)})\.[a-z_][\w.]*)(?![\w(/])", span):
            of_python = name.startswith("policy.") and hasattr(shoal.TrainedPolicy, name.split(".")[1])
            is_file = name.endswith((".md", ".json", ".jsonl", ".py", ".yaml"))
            if of_python or is_file or name == "policy.network":
                continue
            assert name in known or name in sections or name.startswith(entries), f"{page.name}: {name}"
        if span.startswith("shoal "):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", span)) <= options, f"{page.name}: {span}"


@pages
def test_metrics_that_are_named_exist(page: Path) -> None:
    """Catches a metric that was renamed."""
    known = {entry.name for entry in CATALOGUE} | set(INFO)
    for span in spans(page):
        for name, more in re.findall(r"\b(shoal_[a-z]\w*?)(_?\*)?(?![\w])", span):
            assert name in known or (more and any(one.startswith(name) for one in known)), f"{page.name}: {span}"


def test_the_reference_has_every_public_name() -> None:
    """Catches a name that was added to ``import shoal`` and is documented nowhere, or is gone."""
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: shoal\.(\w+)$", TEXT[BY_NAME["reference.md"]], re.M)
    assert sorted(listed) == sorted(shoal.__all__)


def test_the_reference_has_every_setting() -> None:
    """Catches a setting without an entry, and one whose docstring was not found."""
    text = settings_reference()
    entries = dict(re.findall(r"^`([\w.]+)`\n: (.*\n(?:\n  .+)?)", text, re.M))
    assert set(_all_paths()) <= set(entries)
    assert "`learner.schedules.NAME.end`" in text
    assert "`policy.components.NAME.kind`" in text
    assert "Segments (unroll_length steps of one slot) per update" in entries["learner.batch_size"]
    assert "Default: `auto`. Values: a whole number, at least 1, or `auto`." in entries["learner.batch_size"]
    assert "any gymnasium id" in entries["env.id"]
    defaults = Config()
    assert f"Default: `{defaults.actor.unroll_length}`" in entries["actor.unroll_length"]
    assert TEXT[BY_NAME["settings.md"]].count(MARKER) == 1


def test_settings_of_families_can_be_copied() -> None:
    """Catches a row that leaves settings out, or has others than those that were tried."""
    text = TEXT[BY_NAME["environments.md"]]
    rows = re.findall(r"^\| ([^|]+) \| [^|]* \| [^|]* \| `([^`|]+)` \| [^|]* \| [^|]* \|$", text, re.M)
    tried = yaml.safe_load((ROOT / "tests" / "bench" / "families.yaml").read_text(encoding="utf-8"))
    assert {family: shlex.split(settings) for family, settings in rows} == {
        family: entry["settings"] for family, entry in tried.items()
    }


def test_pictures_are_those_that_the_command_draws() -> None:
    """Catches a picture that was not drawn anew: ``python -m shoal.deploy.docs.pictures``."""
    drawn = pictures.rendered()
    assert {path.name for path in pictures.PICTURES.glob("*.svg")} == set(drawn)
    for name, text in drawn.items():
        assert (pictures.PICTURES / name).read_text(encoding="utf-8") == text, name


@functools.cache
def literals() -> list[str]:
    """Every string of the sources, with ``...`` for what is put in."""
    found = []
    packages = ("actors", "deploy", "envs", "learner", "policy")
    sources = [*ROOT.glob("*.py"), *(source for package in packages for source in (ROOT / package).rglob("*.py"))]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(map(str, parts)))
    return found


MESSAGES = re.findall(r"^`(.+)`\n: ", TEXT[BY_NAME["troubleshooting.md"]], re.M)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    """Catches a message that was reworded, which nobody would find on the page any more."""
    parts = [part for part in message.split("...") if part.strip(" :;,().")]
    assert parts
    assert any(all(part in text for part in parts) for text in literals())


def test_the_page_of_messages_is_not_empty() -> None:
    """Catches a page of which the test above reads nothing."""
    assert len(MESSAGES) > 50


def test_pages_are_found() -> None:
    """Catches a site whose pages the tests above do not see."""
    assert len(PAGES) > 20
    assert DOCS / "index.md" in PAGES
    assert {block.language for block in BLOCKS} >= {"bash", "python"}
