"""The root configuration: YAML files, then ``key.sub=value`` arguments, validated at once and before anything starts.

Every section is a frozen pydantic dataclass beside the code that it configures, and checks its types and ranges
wherever it is made; this module words the problems. Importing it imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import re
import reprlib
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from shoal.actors.config import EPISODE
from shoal.deploy.settings.sections import Config
from shoal.deploy.settings.written import NAMED_BY, why_no_setting
from shoal.policy.graph import components_to_json

CONFIGS = Path(__file__).parent / "configs"
MAX_FILE_BYTES = 2**16
"""Many times the largest configuration; seconds for the parser."""
MAX_DEPTH = 32
MAX_NESTING = 100
"""Levels of a value in YAML."""
MAX_PROBLEMS = 100
"""Problems of values that are explained; the others are counted."""

_ELSEWHERE = {
    **dict.fromkeys(("lr", "alpha"), "learner.learning_rate"),
    **dict.fromkeys(("n_steps", "num_steps", "rollout", "horizon", "rollout_fragment_length"), "actor.unroll_length"),
    **dict.fromkeys(("n_envs", "num_envs_per_worker", "num_envs_per_env_runner"), "env.num_envs"),
    **dict.fromkeys(("num_workers", "num_env_runners"), "actor.num_actors"),
    **dict.fromkeys(("n_epochs", "num_epochs", "update_epochs"), "learner.epochs"),
    **dict.fromkeys(("num_minibatches", "num_batches_per_epoch"), "learner.minibatches"),
    **dict.fromkeys(("train_batch_size", "train_batch_size_per_learner"), "learner.batch_size"),
    **dict.fromkeys(("total_timesteps", "train_for_env_steps", "num_timesteps", "steps"), "total_env_steps"),
    **dict.fromkeys(("ent_coef", "exploration_loss_coeff", "entropy_coeff"), "learner.entropy_coef"),
    **dict.fromkeys(("vf_coef", "value_loss_coeff", "vf_loss_coeff"), "learner.value_coef"),
    **dict.fromkeys(("clip_range", "ppo_clip_ratio", "clip_param"), "learner.clip_coef"),
    **dict.fromkeys(("grad_clip", "max_gradient_norm"), "learner.max_grad_norm"),
    **dict.fromkeys(("env_id", "env_name"), "env.id"),
    **dict.fromkeys(("num_gpus", "accelerator"), "learner.device"),
    **dict.fromkeys(("log_dir", "train_dir", "output_dir", "save_dir"), "run_dir"),
}
"""Settings by the names that Stable-Baselines3, Sample Factory, RLlib and CleanRL have for them."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class ConfigError(ValueError):
    """All problems of a configuration, each with its dotted path."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_config(files: Sequence[str | Path], arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Merge files (later ones win) and arguments, and validate.

    Returns the configuration and all problems found. With problems, the settings that caused them have their defaults,
    so that the caller can go on looking for more; nothing may be started with it.
    """
    problems: list[str] = []
    raw: dict[str, Any] = {}
    for file in files:
        _merge(raw, _read(Path(file), problems))
    for argument in arguments:
        _merge(raw, _parse(argument, problems))
    return _validated(raw, problems)


def resolve(*layers: Mapping[str, Any] | str | Path) -> tuple[Config, list[str]]:
    """``load_config`` for settings as Python values, over each other: of two that set the same, the later one counts.

    Args:
        layers: files as in ``load_config``; or plain data by key, dotted or not, where the value of a section is a
            mapping of its settings.
    """
    problems: list[str] = []
    raw: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, Mapping):
            for path, value in layer.items():
                _merge(raw, _setting(path, value))
        else:
            _merge(raw, _read(Path(layer), problems))
    return _validated(raw, problems)


def _validated(raw: dict[str, Any], problems: list[str]) -> tuple[Config, list[str]]:
    adapter = _adapter()
    unexplained = 0
    # Bad settings are taken out and the rest is validated again: a section is checked across its fields only once each
    # of them is right.
    config = None
    told: set[tuple[str, ...]] = set()
    while config is None:
        try:
            config = adapter.validate_python(raw)
        except ValidationError as error:
            found: dict[tuple[str, ...], list[ErrorDetails]] = {}
            for detail in error.errors(include_url=False):
                found.setdefault(_known(raw, detail["loc"]), []).append(detail)
            _drop_other_branches(found)
            for path, details in sorted(found.items(), key=lambda item: item[1][0]["type"] == "missing"):
                # What is missing was taken out, or is there under a wrong name.
                follows = details[0]["type"] == "missing" and any(one[: len(path)] == path for one in told)
                told.add(path)
                if not follows and len(problems) < MAX_PROBLEMS:
                    problems += _explain(path, details)
                elif not follows:
                    unexplained += 1
                _remove(raw, path, details)
    problems += _cross_checks(config)
    if not any(path[:1] == ("policies",) for path in told):
        problems += _policies(config)
    if unexplained:
        problems.append(f"{unexplained} more problems like these; correct the first ones, then look again")
    return config, list(dict.fromkeys(problems))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data."""
    data = dataclasses.asdict(config)
    # Only the settings that are set: the others are as in the default graph.
    data["policy"]["components"] = components_to_json(config.policy.components)
    return data


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that ``--config`` reads."""
    return dump(to_dict(config))


def dump(settings: Mapping[str, Any]) -> str:
    """Settings as plain data as a file that ``--config`` reads."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that stand in a file, as plain data; they are not validated.

    Raises:
        ValueError: it cannot be read.
    """
    problems: list[str] = []
    settings = _read(path, problems)
    if problems:
        raise ValueError(problems[0].removeprefix("--config "))
    return settings


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return _adapter().json_schema()


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _cross_checks(config: Config) -> list[str]:
    """Problems between sections."""
    problems = []
    batch, envs = config.learner.batch_size, config.env.num_envs
    if batch == "auto":
        pass
    elif batch % envs:
        below, above = batch // envs * envs, -(-batch // envs) * envs
        nearest = f"{below} or {above}" if below else f"{above}"
        problems.append(
            f"learner.batch_size: {batch} segments are not a whole number of unrolls of env.num_envs={envs} slots; "
            f"use {nearest}"
        )
    elif (
        config.actor.max_policy_lag == 0
        and config.actor.num_actors != "auto"
        and batch % (envs * config.actor.num_actors)
    ):
        problems.append(
            f"learner.batch_size: in lock step (actor.max_policy_lag=0) {batch} must be a multiple of env.num_envs x "
            f"actor.num_actors = {envs * config.actor.num_actors}, so that every actor gives each update the same share"
        )
    if config.actor.burn_in and config.learner.refresh_states:
        problems.append(
            f"learner.refresh_states: segments start either from refreshed states or from actor.burn_in="
            f"{config.actor.burn_in} rows before them, not from both; set one of the two to nothing"
        )
    problems += [
        f"learner.schedules.{name}.warmup_env_steps: {schedule.warmup_env_steps} leaves nothing of total_env_steps="
        f"{config.total_env_steps}, which includes it"
        for name, schedule in config.learner.schedules.items()
        if schedule.over_env_steps == "run" and schedule.warmup_env_steps >= config.total_env_steps
    ]
    if config.self_play.share and config.mode == "cluster":
        problems.append(
            "self_play.share: games against versions of the policy are played in mode=inline and mode=local; choose "
            "one of these, or self_play.share=0"
        )
    if config.evaluation.every_env_steps > config.total_env_steps:
        problems.append(
            f"evaluation.every_env_steps: {config.evaluation.every_env_steps} is more than total_env_steps="
            f"{config.total_env_steps}: none would ever be made"
        )
    return problems


def _policies(config: Config) -> list[str]:
    """Settings that do not work with several policies."""
    if not config.policies:
        return []
    if len(config.policies) == 1:
        (name,) = config.policies
        return [f"policies: {name} alone is one policy for all agents, as without policies; leave it out, or name two"]
    seen: dict[str, str] = {}
    alike = [
        f"policies: {first} and {name} differ in case only, and would have one folder where a disk ignores case; "
        "choose names that differ otherwise"
        for name in config.policies
        if (first := seen.setdefault(name.casefold(), name)) != name
    ]
    # Each with what it is, and what it should be.
    refused = {
        "learner.num_learners": (
            config.learner.num_learners not in ("auto", 1),
            "is more than the one learner that every policy has; leave it out",
        ),
        "placement": (
            config.placement == "colocated",
            "would have learners act; several policies are fed by actors of their own: choose placement=disaggregated",
        ),
        "actor.reset_memory": (
            config.actor.reset_memory != EPISODE,
            "carries the memory across games, which works with one policy; leave it out",
        ),
        "self_play.share": (bool(config.self_play.share), "is for one policy that plays all agents; leave one out"),
        "policy.map_features": (bool(config.policy.map_features), "is for the names of one policy; leave it out"),
        "policy.map_actions": (bool(config.policy.map_actions), "is for the names of one policy; leave it out"),
    }
    return alike + [
        f"{name}: does not work with policies={', '.join(config.policies)}: {_said(config, name)} {why}"
        for name, (given, why) in refused.items()
        if given
    ]


def _said(config: Config, path: str) -> str:
    """A setting with its value, in words."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return f"{path.split('.')[-1]}={value}" if isinstance(value, int | float | str) else path.split(".")[-1]


class BoundedComposer:
    """For PyYAML's loaders: no alias, because a few lines of them expand to gigabytes, and no endless nesting, which
    costs the square of its depth."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the loader's, but for these."""
        # mypy does not know that this is mixed into a loader, which has both methods.
        event = self.peek_event()  # type: ignore[attr-defined]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        if self._depth == MAX_NESTING:
            what = f"nested deeper than {MAX_NESTING} levels"
            raise yaml.composer.ComposerError(None, None, what, mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[misc]
        finally:
            self._depth -= 1


class _Loader(BoundedComposer, yaml.SafeLoader):
    """Plain words as in YAML 1.2: in 1.1 ``no`` is false, ``1e-3`` a string, ``12:30`` a number. No key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (filled below; PyYAML copies what it shares)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the base class, but YAML would silently take the last of equal keys, and keys here are names."""
        names: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is no name", key.start_mark)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would not read back as a string."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (filled below; PyYAML copies what it shares)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _kind == "null" else [])]
        )


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    """A file, or a shipped configuration by its bare name."""
    if not path.exists() and (CONFIGS / f"{path}.yaml").exists():
        path = CONFIGS / f"{path}.yaml"
    try:
        data = _load(_text(path))
    except FileNotFoundError:
        problems.append(f"--config {path}: there is no such file, nor a shipped configuration ({_shipped()})")
        return {}
    except Exception as error:  # noqa: BLE001  (PyYAML raises all sorts of things for odd tags and numbers)
        problems.append(f"--config {path}: {' '.join(str(error).split())} (shipped configurations: {_shipped()})")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        problems.append(f"--config {path}: expected a mapping of settings, got {type(data).__name__}")
        return {}
    return data


def _shipped() -> str:
    return ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))


def _text(path: Path) -> str:
    # Before it is opened: opening a pipe waits for a writer, and some devices do something then.
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise ValueError(f"expected a file with settings in YAML, got {kind}; write the settings to a file")
    with path.open("rb") as file:
        # Its size may be given as 0, as in /proc.
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"expected at most {MAX_FILE_BYTES // 1024} KiB of settings, got more; is it the right file?")
    return content.decode()


def _parse(argument: str, problems: list[str]) -> dict[str, Any]:
    path, _, text = argument.partition("=")
    if wrong := why_no_setting(argument):
        problems.append(wrong)
        return {}
    if path.count(".") >= MAX_DEPTH:
        problems.append(f"argument {_short.repr(argument)}: expected a key of at most {MAX_DEPTH} parts")
        return {}
    try:
        value = _load(text) if text else ""
    except Exception as error:  # noqa: BLE001  (as above)
        if text.lstrip().startswith(("[", "{")):
            why = str(getattr(error, "problem", None) or error).splitlines()[0]
            problems.append(
                f"argument {_short.repr(argument)}: expected a list or mapping in YAML or JSON, and {why}; text that "
                "begins with a bracket is written in quotes of its own"
            )
            return {}
        # A string that only looks like more, e.g. a path with a colon.
        value = text
    return _setting(path, value)


def _setting(path: str, value: Any) -> dict[str, Any]:
    """The mapping of mappings that has ``value`` at a dotted path."""
    *sections, name = path.split(".")
    setting = {name: value}
    for section in reversed(sections):
        setting = {section: setting}
    return setting


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}  # a copy, out of which bad settings are taken later
            _merge(into[key], value)
        else:
            into[key] = value


def _known(raw: Mapping[str, Any], loc: Sequence[Any]) -> tuple[str, ...]:
    """The parts of an error's location that are keys of the input; unions and validators add others."""
    found: list[str] = []
    here: Any = raw
    for part in loc:
        if isinstance(here, Mapping) and part in here:
            found.append(part)
            here = here[part]
    return tuple(found)


def _drop_other_branches(found: dict[tuple[str, ...], list[ErrorDetails]]) -> None:
    """Of a union leave out what the branches miss that are no mappings, where the input is one and has errors inside:
    it is meant to be one."""
    for path, details in list(found.items()):
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in found)
        # Behind a path is the branch's name; behind that of a missing setting its own.
        if inside and all(detail["type"] != "missing" and len(detail["loc"]) > len(path) for detail in details):
            del found[path]


def _remove(raw: dict[str, Any], path: tuple[str, ...], details: Sequence[ErrorDetails]) -> None:
    """Take out the settings that an error is about, and nothing that could have problems of its own."""
    here: Any = raw
    for part in path[:-1]:
        here = here.get(part, {})
    section: Any = here.get(path[-1], {}) if path else raw
    involved = _involved(details[0])
    if isinstance(section, dict) and any(name in section for name in involved):
        for name in involved:
            section.pop(name, None)
    elif path:
        here.pop(path[-1], None)
    else:
        raw.clear()


def _involved(detail: ErrorDetails) -> Mapping[str, Any]:
    """The settings of a section that an error across its fields names; empty for an error of one field."""
    return detail["ctx"] if detail["type"] == "cross_field" else {}


def _explain(path: tuple[str, ...], details: Sequence[ErrorDetails]) -> list[str]:
    fields = _fields_of_elements(path)
    if not fields:
        return _explain_one(path, details)
    # The elements of a list of sections share its path, and each may have another problem.
    unknown = {detail["loc"][:-1] for detail in details if detail["type"] == "unexpected_keyword_argument"}
    problems: list[str] = []
    alike: dict[str, list[ErrorDetails]] = {}
    for detail in details[:MAX_PROBLEMS]:
        kind, name = detail["type"], str(detail["loc"][-1])
        if kind == "unexpected_keyword_argument":
            problems.append(_unknown((*path, name), _near((*path, name), fields), fields))
        elif kind == "cross_field":
            problems += _explain_one(path, [detail])
        elif kind != "missing" or detail["loc"][:-1] not in unknown:
            alike.setdefault(kind, []).append(detail)
    if wrong := alike.pop("dataclass_type", []):
        each = f"each must be a name, or a mapping of {' and '.join(fields)}"
        problems.append(f"{'.'.join(path)}: {each} (got {_got(wrong)})")
    return [*problems, *(line for some in alike.values() for line in _explain_one(path, some))]


def _explain_one(path: tuple[str, ...], details: Sequence[ErrorDetails]) -> list[str]:
    dotted, kind = ".".join(path), details[0]["type"]
    if kind == "unexpected_keyword_argument":
        fields = _fields_at(path[:-1])
        # A key of that very name elsewhere is likelier than one that looks like it here.
        name = path[-1]
        meant = _paths_by_name().get(name) or ([_ELSEWHERE[name]] if name in _ELSEWHERE else [])
        return [_unknown(path, meant or _near(path, fields), fields)]
    if kind == "dataclass_type":
        value = details[0]["input"]
        about = NAMED_BY.get(dotted)
        if about and isinstance(value, str) and value:
            return [f"{dotted}: is a section of settings; did you mean {dotted}.{about}={value}?"]
        known = [about] if about else _fields_at(path)
        example = f"; set one of them, e.g. {dotted}.{known[0]}" if known else ""
        return [f"{dotted}: is a section of settings{example} (got {_short.repr(value)})"]
    if kind == "cross_field":
        # The message names the fields, and may be several problems, a line each.
        return [f"{dotted}.{line}" if dotted else line for line in details[0]["msg"].splitlines()]
    if kind == "missing":
        return [f"{dotted}.{detail['loc'][-1]}: must be given, there is no default" for detail in details]
    # Several errors of one setting are the branches of a union, or the elements of a list.
    expected = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in details)
    got = _got(details)
    hint = _spelling(kind, details[0]["input"]) or ("" if got.endswith("...") else _meant(details))
    return [f"{dotted}: {' or '.join(expected)} (got {got}{hint})"]


def _got(details: Sequence[ErrorDetails]) -> str:
    """What the settings gave, the first of them by name."""
    got = list(dict.fromkeys(_short.repr(detail["input"]) for detail in itertools.islice(details, MAX_PROBLEMS)))
    return ", ".join([*got[:8], *(["..."] if len(got) > 8 else [])])


def _unknown(path: tuple[str, ...], meant: Sequence[str], fields: Sequence[str]) -> str:
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(fields)}"
    return f"{'.'.join(path)}: unknown key; {hint}"


def _near(path: tuple[str, ...], fields: Sequence[str]) -> list[str]:
    """The setting beside it that a misspelt one comes nearest to, if any."""
    return [".".join((*path[:-1], name)) for name in difflib.get_close_matches(path[-1], fields, n=1)]


def _spelling(kind: str, value: Any) -> str:
    """Advice on a value that is right but for its type; empty where there is none."""
    if kind == "string_type" and isinstance(value, int | float):
        return "; write it in quotes"
    if kind == "bool_type":
        return "; write true or false"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        text, factor = value.strip(), {"k": 1e3, "m": 1e6}.get(value.strip()[-1:].lower(), 1.0)
        try:
            number = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            return ""
        if math.isfinite(number):
            return f"; write {number:.15g}" + (" without quotes" if factor == 1 else "")
    return ""


def _meant(details: Sequence[ErrorDetails]) -> str:
    """The word of a fixed choice that a misspelt one comes nearest to, as a hint; empty where none is near."""
    choices = [detail["ctx"]["expected"] for detail in details if detail["type"] == "literal_error"]
    words = [word for choice in choices for word in re.findall(r"'(\w+)'", choice)]
    near = [match for d in details for match in difflib.get_close_matches(str(d["input"]), words, n=1)]
    return f"; did you mean {near[0]}?" if near else ""


def _fields_at(path: Sequence[str]) -> list[str]:
    """The settings of the section at a path; none where there is no section."""
    return _fields(section_of(_hint_at(path)))


def _fields_of_elements(path: Sequence[str]) -> list[str]:
    """The settings of each section in the list at a path; none where there is no list of sections."""
    hint = _hint_at(path)
    return _fields(section_of(typing.get_args(hint)[0])) if typing.get_origin(hint) is list else []


def _hint_at(path: Sequence[str]) -> Any:
    hint: Any = Config
    for part in path:
        if typing.get_origin(hint) is Mapping:
            hint = typing.get_args(hint)[1]
        else:
            cls = section_of(hint)
            hint = typing.get_type_hints(cls).get(part) if cls else None
    return hint


def _fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def section_of(hint: Any) -> Any:
    """The section that a type hint of a setting is, or may be; None for others."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


@functools.cache
def _paths_by_name() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in _all_paths():
        found.setdefault(path.split(".")[-1], []).append(path)
    return found


def _all_paths(cls: Any = Config, prefix: str = "") -> list[str]:
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        section = section_of(hint)
        paths += _all_paths(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return paths
