"""The configuration: everything that is wrong is said at once, with its path, and nothing is started."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shoal.deploy.cli import main
from shoal.deploy.settings.load import (
    _ELSEWHERE,
    CONFIGS,
    MAX_PROBLEMS,
    _all_paths,
    json_schema,
    load_config,
    to_dict,
    to_yaml,
)
from shoal.deploy.settings.sections import Config
from shoal.envs.config import EnvConfig
from shoal.learner.config import LearnerConfig


def problems_of(*arguments: str, files: tuple[Path, ...] = ()) -> list[str]:
    return load_config(files, arguments)[1]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("learner.batchsize=64", "learner.batchsize: unknown key; did you mean learner.batch_size?"),
        ("batch_size=64", "batch_size: unknown key; did you mean learner.batch_size?"),
        ("actor.num_envs=4", "actor.num_envs: unknown key; did you mean env.num_envs?"),
        ("sed=4", "sed: unknown key; did you mean seed?"),
        ("zzz=4", "zzz: unknown key; known here: mode, placement, seed, run_dir,"),
        ("policy.initialization.lstm_bas=ones", "did you mean policy.initialization.lstm_bias?"),
        ("learner.regularization.clip_overrides={lstm: x}", "learner.regularization.clip_overrides.lstm: "),
        ("learner.gamma=high", "learner.gamma: Input should be a valid number"),
        ("learner.gamma=1.5", "learner.gamma: Input should be less than or equal to 1 (got 1.5)"),
        ("seed=1.5", "seed: Input should be a valid integer"),
        ("mode=remote", "mode: Input should be 'inline', 'local' or 'cluster' (got 'remote')"),
        ("actor.num_actors=many", "Input should be 'auto' (got 'many')"),
        ("env=5", "env: is a section of settings"),
        ("env.id=", "env.id: must name an environment, e.g. 'mettagrid/forage' (got '')"),
        ("run_dir=12", "(got 12; write it in quotes)"),
        ("total_env_steps=0", "total_env_steps: Input should be greater than or equal to 1 (got 0)"),
        ("checkpoint.keep=1", "checkpoint.keep: Input should be greater than or equal to 2 (got 1)"),
        ("metrics.port=70000", "metrics.port: Input should be less than or equal to 65535 (got 70000)"),
        ("learner.batch_size=100", "learner.batch_size: 100 segments are not a whole number of unrolls"),
        ("env.num_envs=60", "env.num_envs=60 must be a multiple of the 8 agents of mettagrid/forage"),
        ("learner={batch_size: 64, minibatches: 3}", "batch_size=64 must be a multiple of minibatches=3"),
        ("learner.num_learners=0", "Input should be greater than or equal to 1 or Input should be 'auto' (got 0)"),
        ("env.num_envs=true", "env.num_envs: Input should be a valid integer (got True)"),
        ("learner.learning_rate=.inf", "learner.learning_rate: Input should be a finite number (got inf)"),
        ("learner.max_grad_norm=.nan", "learner.max_grad_norm: Input should be greater than 0 (got nan)"),
        (
            "log.sinks=[a, b]",
            "log.sinks: must be tensorboard, wandb, trackio, or a shoal.Sink of yours as package.module:Class (got",
        ),
        ("log.sinks=[wandbb]", "did you mean wandb?"),
        ("log.sinks=[{name: wandb, kwargs: {a: 1}}]", "log.sinks.kwargs are for a sink of yours, and wandb takes none"),
        ("log.sinks=[3]", "log.sinks: each must be a name, or a mapping of name and kwargs (got 3)"),
        ("log.sinks=[null, [a]]", "log.sinks: each must be a name, or a mapping of name and kwargs (got None, ['a'])"),
        ("callbacks=[3]", "callbacks: each must be a name, or a mapping of name and kwargs (got 3)"),
        (
            "log.sinks=[{name: tensorboard, kwarg: {}}]",
            "log.sinks.kwarg: unknown key; did you mean log.sinks.kwargs?",
        ),
        ("callbacks=[{callbacks: a:b}]", "callbacks.callbacks: unknown key; known here: name, kwargs"),
        ("policy.map_actions=[up]", "must be of the form ENVIRONMENT=TRAINED, where one side may be empty (got 'up')"),
        ("cluster.actor_cpus=0", "cluster.actor_cpus=0 needs actor_resources"),
        ("metrics={tls_key: k, token_file: t}", "metrics.tls_key=k, token_file=t: tls_certificate must be set, too"),
        ("justtext", "argument 'justtext': expected key=value"),
        ("=3", "argument '=3': expected key=value"),
        ("learner..gamma=1", "argument 'learner..gamma=1': expected key=value"),
        (".".join("a" * 40) + "=1", "expected a key of at most 32 parts"),
        ("learner.gamma='0.5'", "learner.gamma: Input should be a valid number (got '0.5'; write 0.5 without quotes)"),
        ("learner.batch_size='64'", "or Input should be 'auto' (got '64'; write 64 without quotes)"),
        ("seed=007", "seed: Input should be a valid integer (got '007'; write 7 without quotes)"),
        ("seed=.inf", "seed: Input should be a valid integer (got inf)"),
        ("learner.epochs=true", "learner.epochs: Input should be a valid integer (got True)"),
        ("learner.gamma=true", "learner.gamma: Input should be a valid number (got True)"),
        ("learner.compile=1", "learner.compile: Input should be a valid boolean (got 1; write true or false)"),
        ("max_seconds=1e10", "max_seconds: Input should be less than or equal to 1000000000 (got 10000000000)"),
        ("total_env_steps=1e308", "total_env_steps: Input should be a valid integer (got 1e+308)"),
        ("learner.num_threads=1e9", "learner.num_threads: Input should be less than or equal to 1024"),
        (f"mode={'x' * 2**16}", "xxx...xxx"),
        ("env=CartPole-v1", "env: is a section of settings; did you mean env.id=CartPole-v1?"),
        ("policy=nets:Mine", "did you mean policy.kind=nets:Mine?"),
        ("learner=5", "learner: is a section of settings; set one of them, e.g. learner.device (got 5)"),
        ("learner.loss=impala", "learner.loss=impala is for epochs=1, got epochs=4: its importance weights"),
        (
            "learner.loss=ppoo",
            "learner.loss: must be ppo, impala, or a loss of yours as package.module:name; did",
        ),
        (
            "learner.optimizer=sgd",
            "learner.optimizer: must be adam, or a torch.optim.Optimizer as package.module",
        ),
        ("callbacks=[mine]", "callbacks: must be the name of a callback as package.module:Name"),
        ("lr=3e-4", "lr: unknown key; did you mean learner.learning_rate?"),
        ("learner.n_epochs=3", "did you mean learner.epochs?"),
        ("total_env_steps=150k", "write 150000)"),
        ("policy.image_encoder=residul", "(got 'residul'; did you mean residual?)"),
        ("policy.image_encoder={a: residul}", "policy.image_encoder.a: Input should be 'small' or 'residual' (got 're"),
        ("policy.image_encoder={a: {b: small}}", "policy.image_encoder.a: Input should be 'small' or 'residual' (got"),
        ("policy.image_encoder=[small]", "policy.image_encoder: Input should be 'small' or 'residual' or Input should"),
    ],
)
def test_one_problem_is_one_line_that_names_it(argument: str, expected: str) -> None:
    """Catches a problem without its path or hint, and one that brings others along."""
    [problem] = problems_of(argument)
    assert expected in problem


def test_all_problems_come_at_once() -> None:
    """Catches a first problem that hides others: of its section, of the top level, of what sections must agree on."""
    found = problems_of(
        "seed=-1",
        "max_seconds=-1",
        "total_env_steps=0",
        "mode=x",
        "policy.kin=fast",
        "actor.unroll_length=0",
        "actor.num_threads=0",
        "actor.num_actors=x",
        "checkpoint.keep=0",
        "checkpoint.every_updates=-1",
        "learner.epochs=0",
        "learner.gamma=2",
        "learner.clip_coef=nonsense",
        "learner.batch_size=100",
        "nonsense",
    )
    starts = [problem.removeprefix("argument ").replace("=", ":").split(":")[0].strip("'") for problem in found]
    assert set(starts) == {
        *("seed", "max_seconds", "total_env_steps", "mode", "policy.kin", "nonsense"),
        *("actor.unroll_length", "actor.num_threads", "actor.num_actors"),
        *("checkpoint.keep", "checkpoint.every_updates"),
        *("learner.epochs", "learner.gamma", "learner.clip_coef", "learner.batch_size"),
    }
    assert len(starts) == len(set(starts))


def test_every_element_of_a_list_has_its_problem_told() -> None:
    """Catches an element whose problem is taken for that of another, or that is told only once the first is mended."""
    sinks = "{name: wandb, kwargs: {a: 1}}, name, {kwargs: {}}, 3, {nam: wandb}, {name: trackio, kwargs: {a: 1}}"
    assert problems_of(f"log.sinks=[{sinks}]") == [
        "log.sinks.kwargs are for a sink of yours, and wandb takes none; leave them out",
        "log.sinks.nam: unknown key; did you mean log.sinks.name?",
        "log.sinks.kwargs are for a sink of yours, and trackio takes none; leave them out",
        "log.sinks: each must be a name, or a mapping of name and kwargs (got 3)",
        "log.sinks: must be tensorboard, wandb, trackio, or a shoal.Sink of yours as package.module:Class (got 'name')",
        "log.sinks.name: must be given, there is no default",
    ]


def test_lock_step_shares_a_batch_equally() -> None:
    """Catches a lock step in which some actor waits for ever: its share of the batch is no whole unroll."""
    lock_step = ("env.id=recall", "env.num_envs=16", "actor.max_policy_lag=0", "learner.batch_size=64")
    assert problems_of(*lock_step, "actor.num_actors=4") == []
    [problem] = problems_of(*lock_step, "actor.num_actors=3")
    assert "must be a multiple of env.num_envs x actor.num_actors = 48" in problem
    assert len(problems_of(*lock_step, "actor.num_actors=8")) == 1


def test_an_evaluation_that_would_never_come_is_refused() -> None:
    """Catches evaluation that was asked for and silently never made."""
    [problem] = problems_of("evaluation.every_env_steps=200", "total_env_steps=100")
    assert problem.startswith("evaluation.every_env_steps: 200 is more than total_env_steps=100")


def test_burn_in_is_checked() -> None:
    """Catches rows that no unroll has, and two ways to start a segment at once."""
    [problem] = problems_of("actor.unroll_length=16", "actor.burn_in=17")
    assert "burn_in=17 must lie in 0..unroll_length=16" in problem
    [problem] = problems_of("actor.burn_in=4", "learner.refresh_states=true")
    assert problem.startswith("learner.refresh_states: ")
    assert "actor.burn_in=4" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("learner:\n  gamma: 0.9\n  gamma: 0.8\n", "key 'gamma' stands twice"),
        ("a: &a [1, 2]\nb: *a\n", "aliases are not supported"),
        ("- 1\n- 2\n", "expected a mapping of settings, got list"),
        ("just text", "expected a mapping of settings, got str"),
        ("1: 2\n", "key 1 is no name"),
        ("learner: {gamma: 0.9\n", "--config"),
        ("x: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("x: !!timestamp never\n", "--config"),
        ("\0", "--config"),
        ("[" * 5000, "--config"),
    ],
)
def test_a_bad_file_is_a_problem(tmp_path: Path, text: str, expected: str) -> None:
    """Catches YAML's surprises: equal keys, bombs of aliases, objects, and parser errors as tracebacks."""
    [problem] = problems_of(files=(write(tmp_path / "c.yaml", text),))
    assert expected in problem
    assert str(tmp_path / "c.yaml") in problem


@pytest.mark.parametrize("text", ["{1: a, 2: b}", "[1, 2", "{a: 1, a: 2}", " [a: {"])
def test_half_a_list_is_no_text(text: str) -> None:
    """Catches a typing error in a list or mapping that reaches the environment as text."""
    _, problems = load_config((), [f"env.kwargs.table={text}"])
    assert len(problems) == 1
    assert "expected a list or mapping in YAML or JSON" in problems[0]
    assert load_config((), [f"env.kwargs.table='{text}'"])[0].env.kwargs == {"table": text}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Catches a mistyped name without a word of what there is."""
    [problem] = problems_of(files=(tmp_path / "none.yaml",))
    assert "there is no such file, nor a shipped configuration (forage, " in problem
    assert "recall" in problem


def test_only_a_small_file_is_read(tmp_path: Path) -> None:
    """Catches a device that is read for ever, a pipe that nobody writes to, and a data set that is parsed for hours."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (("/dev/zero", "a device or a socket"), (tmp_path / "pipe", "a pipe"), (tmp_path, "a directory")):
        [problem] = problems_of(files=(Path(path),))
        assert problem.startswith(f"--config {path}: expected a file with settings in YAML, got {kind}; write")
    [problem] = problems_of(files=(write(tmp_path / "big.yaml", "#" * 2**16 + "\n"),))
    assert "expected at most 64 KiB of settings, got more" in problem


def test_problems_beyond_number_are_counted() -> None:
    """Catches megabytes of explanations for a file that is no configuration, each after a search for likely names."""
    found = problems_of(*(f"key{i}=1" for i in range(2000)))
    assert found[0].startswith("key0: unknown key; ")
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1].startswith(f"{2000 - MAX_PROBLEMS} more problems like these; ")
    [problem] = problems_of(f"log.sinks=[{', '.join(f'tracker{i}' for i in range(2000))}]")
    assert "(got 'tracker0', 'tracker1', " in problem
    assert problem.endswith("'tracker7', ...)")


def test_plain_words_mean_what_they_say(tmp_path: Path) -> None:
    """Catches YAML 1.1: 1e-3 as a string, 1e6 refused for a count, `no` as false, a date or a time as anything else."""
    config, problems = load_config((), ["learner.learning_rate=1e-3", "total_env_steps=1e6", "resume=no"])
    assert not problems
    assert (config.learner.learning_rate, config.total_env_steps, config.resume) == (1e-3, 1_000_000, "no")
    for word, number in (("1E-3", 1e-3), (".5e-2", 5e-3), ("1.e-3", 1e-3), ("1.", 1.0), ("+0.1", 0.1)):
        expected = Config(learner=LearnerConfig(learning_rate=number))
        assert load_config((), [f"learner.learning_rate={word}"]) == (expected, [])
    for word in ("1_000", "1e3", "1.0e+3", "+1000", "1000.0"):
        assert load_config((), [f"total_env_steps={word}"]) == (Config(total_env_steps=1000), [])
    for word, switch in (("yes", True), ("On", True), ("TRUE", True), ("True", True), ("no", False), ("OFF", False)):
        assert load_config((), [f"learner.compile={word}"]) == (Config(learner=LearnerConfig(compile=switch)), [])
    for word in ("no", "on", "2026-01-02", "12:30", "0x10", "a:b", "x}", "a b", "C:\\x"):
        assert load_config((), [f"run_dir={word}"]) == (Config(run_dir=word), [])
    file = write(tmp_path / "c.yaml", "learner: {learning_rate: 2e-4}\nrun_dir: off\n")
    config, problems = load_config((file,), ["learner.gamma=0.5"])
    assert not problems
    assert (config.learner.learning_rate, config.learner.gamma, config.run_dir) == (2e-4, 0.5, "off")


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    """Catches a later file that wipes a whole section of an earlier one."""
    one = write(tmp_path / "1.yaml", "learner: {gamma: 0.5, epochs: 2}\nenv: {id: recall, kwargs: {delay: 3}}\n")
    two = write(tmp_path / "2.yaml", "learner: {gamma: 0.6}\n")
    config, problems = load_config((one, two), ["env.kwargs.num_cues=2", "learner.epochs=3"])
    assert not problems
    assert (config.learner.gamma, config.learner.epochs) == (0.6, 3)
    assert config.env.kwargs == {"delay": 3, "num_cues": 2}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_load(file: Path) -> None:
    """Catches a renamed key that a shipped file still has; they are found by their bare names."""
    assert load_config((file,), ()) == load_config((file.stem,), ())
    assert problems_of(files=(file,)) == []


words = st.text(max_size=8) | st.sampled_from(
    ["no", "1e6", "1e-3", "null", "~", "07", "0x1", "12:30", "=", "<<", "a: b"]
)


@given(word=words, delay=st.integers(0, 9), rate=st.floats(1e-9, 1e3), seed=st.integers(0, 2**63 - 1))
def test_resolved_configuration_reads_back(
    tmp_path_factory: pytest.TempPathFactory, word: str, delay: int, rate: float, seed: int
) -> None:
    """Catches a resolved config.yaml that means something else when it is used again."""
    env = EnvConfig(id="recall", kwargs={"delay": delay, "word": word})
    config = Config(run_dir=word, seed=seed, env=env, learner=LearnerConfig(learning_rate=rate))
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config((file,), ()) == (config, [])


def test_schema_is_a_json_schema() -> None:
    """Catches a schema that editors reject, and one that accepts what we refuse."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    schema = json.loads(json.dumps(json_schema()))
    validator.check_schema(schema)
    assert list(validator(schema).iter_errors(to_dict(Config()))) == []
    assert list(validator(schema).iter_errors({"learner": {"batchsize": 3}}))
    assert list(validator(schema).iter_errors({"mode": "remote"}))


def test_original_has_the_coefficients_of_the_original_trainer() -> None:
    """Catches a default that changes what ``--config original`` trains."""
    config, problems = load_config(("original",), ())
    assert problems == []
    learner, start = config.learner, config.policy.initialization
    assert (learner.learning_rate, learner.adam_eps, learner.desired_kl) == (0.000457, 1e-12, 0)
    assert (learner.gamma, learner.advantage_lambda, learner.clip_coef) == (0.977, 0.916, 0.1)
    assert (learner.value_clip_coef, learner.value_coef, learner.entropy_coef) == (0.1, 0.44, 0.0021)
    assert (learner.epochs, learner.minibatches, learner.max_grad_norm) == (1, 1, 0.5)
    assert (learner.normalize_values, config.policy.normalize_observations) == (False, False)
    assert (start.lstm_bias, start.action_embeddings, start.log_std) == ("ones", 0.1, 0)
    assert (config.env.num_envs, config.actor.unroll_length, config.actor.max_policy_lag) == (64, 64, 2)


# With these, the bounds of all numbers can be tried one by one: no check across fields refuses a value within them.
BASE = (
    *("env={id: recall, num_envs: 1}", "cluster.actor_resources={gpu: 1}", "log.sinks=[wandb]"),
    *("policy.kind=component", "policy.components.cnn1.size=1", "learner.minibatches=1"),
    "learner.schedules.learning_rate.kind=linear",
)
# Keys for the mappings whose values have bounds.
NAMES = {"policy.components": "cnn1", "cluster.actor_resources": "gpu", "learner.schedules": "learning_rate"}
# Keywords of JSON schema, with the direction in which values are allowed.
LIMITS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}


def numbers_of(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted path, its schema) of every number in a JSON schema."""
    return of_type(schema, "integer", "number")


def of_type(
    schema: Mapping[str, Any], *kinds: str, at: str = "", defs: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted path, its schema) of every value of these types in a JSON schema."""
    defs = schema.get("$defs", {}) if defs is None else defs
    if "$ref" in schema:
        schema = defs[schema["$ref"].split("/")[-1]]
    if schema.get("type") in kinds:
        yield at, schema
    for option in schema.get("anyOf", ()):
        yield from of_type(option, *kinds, at=at, defs=defs)
    for name, inner in schema.get("properties", {}).items():
        yield from of_type(inner, *kinds, at=f"{at}.{name}" if at else name, defs=defs)
    if isinstance(values := schema.get("additionalProperties"), dict):
        yield from of_type(values, *kinds, at=f"{at}.{NAMES.get(at, 'lstm')}", defs=defs)


def next_to(limit: float, direction: int, kind: str) -> float:
    """The nearest number above (1) or below (-1)."""
    return int(limit) + direction if kind == "integer" else math.nextafter(limit, direction * math.inf)


def bounds() -> list[tuple[str, float, float]]:
    """(dotted path, nearest value that is refused, nearest that is taken) of every bound in the schema."""
    found = []
    for path, number in numbers_of(json_schema()):
        for keyword, direction in LIMITS.items():
            if keyword in number:
                limit, kind = number[keyword], number["type"]
                if keyword.startswith("exclusive"):
                    found.append((path, limit, next_to(limit, direction, kind)))
                else:
                    found.append((path, next_to(limit, -direction, kind), limit))
    return found


def section_of(section: Any, names: list[str]) -> tuple[Any, list[str]]:
    """The innermost section that holds a setting, and the setting's names in it."""
    here, found = section, (section, names)
    for depth, name in enumerate(names[:-1], 1):
        here = here[name] if isinstance(here, Mapping) else getattr(here, name)
        if dataclasses.is_dataclass(here):
            found = (here, names[depth:])
    return found


def test_every_number_has_a_lower_bound() -> None:
    """Catches a setting without a range: none means anything at minus a billion."""
    numbers = dict(numbers_of(json_schema()))
    assert {"seed", "learner.gamma", "actor.num_actors", "policy.components.cnn1.size"} < numbers.keys()
    assert "learner.regularization.clip_overrides.lstm" in numbers
    assert [path for path, number in numbers.items() if not {"minimum", "exclusiveMinimum"} & number.keys()] == []


@pytest.mark.parametrize(("path", "outside", "inside"), bounds())
def test_bounds_of_the_schema_hold(path: str, outside: float, inside: float) -> None:
    """Catches a bound that editors show and nothing keeps: in a file, or in a section made by hand."""
    [problem] = problems_of(*BASE, f"{path}={outside!r}")
    assert problem.startswith(f"{path}: Input should be ")
    assert problem.endswith(f"(got {outside!r})")
    config, problems = load_config((), [*BASE, f"{path}={inside!r}"])
    assert problems == []

    section, (name, *keys) = section_of(config, path.split("."))
    assert dataclasses.replace(section, **{name: {keys[0]: inside} if keys else inside}) == section
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(section, **{name: {keys[0]: outside} if keys else outside})


def test_only_limits_may_be_infinite() -> None:
    """Catches a NaN or an infinity that a run would train with; an infinite limit is none."""
    paths = [path for path, number in numbers_of(json_schema()) if number["type"] == "number"]
    found = problems_of(*BASE, *(f"{path}=.nan" for path in paths))
    assert sorted(problem.split(":")[0] for problem in found) == sorted(paths)
    found = problems_of(*BASE, *(f"{path}=.inf" for path in paths))
    assert set(paths) - {problem.split(":")[0] for problem in found} == {
        *("learner.max_grad_norm", "learner.rho_bar", "learner.c_bar", "learner.clip_coef", "learner.value_clip_coef")
    }


def test_no_value_is_converted() -> None:
    """Catches a section that takes quoted numbers and truth values for numbers, as pydantic does by itself."""
    numbers = sorted({path for path, _ in numbers_of(json_schema())})
    switches = sorted({path for path, _ in of_type(json_schema(), "boolean")})
    assert {"seed", "learner.epochs", "learner.regularization.clip_overrides.lstm"} < set(numbers)
    assert {"learner.compile", "cluster.autoscaling"} < set(switches)
    for paths, values in ((numbers, ("'1'", "true")), (switches, ("1", "'1'"))):
        for value in values:
            found = problems_of(*BASE, *(f"{path}={value}" for path in paths))
            assert sorted(problem.split(":")[0] for problem in found) == paths


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (LearnerConfig, {"gamma": 2}, "gamma"),
        (LearnerConfig, {"gamma": "high"}, "gamma"),
        (LearnerConfig, {"gamma": "0.5"}, "gamma"),
        (LearnerConfig, {"epochs": True}, "epochs"),
        (LearnerConfig, {"epochs": 1.5}, "epochs"),
        (LearnerConfig, {"gama": 0.9}, "gama"),
        (LearnerConfig, {"device": "tpu"}, "device"),
        (LearnerConfig, {"batch_size": 64, "minibatches": 3}, "batch_size=64 must be a multiple of minibatches=3"),
        (EnvConfig, {"id": " "}, "must name an environment"),
        (EnvConfig, {"id": "mettagrid/forage", "num_envs": 60}, "num_envs=60 must be a multiple of the 8 agents"),
        (Config, {"learner": {"gamma": 2}}, "learner.gamma"),
    ],
)
def test_sections_made_by_hand_are_checked(cls: Any, settings: dict[str, Any], message: str) -> None:
    """Catches checks that only the command line makes."""
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_sections_are_plain_values() -> None:
    """Catches a configuration that Ray cannot send, that can be changed, or that loses settings on the way."""
    config, _ = load_config((), [*BASE, "learner.gamma=0.5"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert Config(**dataclasses.asdict(config)) == config
    assert not hasattr(config.learner, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learner.gamma = 0.9  # type: ignore[misc]


@pytest.mark.parametrize(
    "module", ["shoal", "shoal.deploy.cli", "shoal.deploy.settings.load", "shoal.deploy.placement.hardware"]
)
def test_importing_costs_nothing(module: str) -> None:
    """Catches an import at the top of a file that makes a typing error take ten seconds to be told."""
    code = f"import {module}, sys; print({{'torch', 'ray', 'mettagrid', 'gymnasium', 'pyarrow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


KEYS = ["seed", "env", "id", "kwargs", "num_envs", "learner", "actor", "policy", "metrics", "port", "batch_size"]
KEYS += ["num_actors", "unroll_length", "regularization", "clip_overrides", "initialization", "gamma", "a", "1", ""]
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(
    data=st.dictionaries(st.sampled_from(KEYS), junk, max_size=5), arguments=st.lists(st.text(max_size=12), max_size=3)
)
def test_junk_never_raises(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], arguments: list[str]
) -> None:
    """Catches input that ends in a traceback, in an endless loop, or in a configuration nobody asked for."""
    file = tmp_path_factory.getbasetemp() / "junk.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    config, problems = load_config((file,), [*arguments, *(f"{key}={value}" for key, value in data.items())])
    assert isinstance(config, Config)
    assert all(problem.strip() for problem in problems)
    assert load_config((), ())[1] == []


def test_nesting_ends_long_before_the_interpreter_does(tmp_path: Path) -> None:
    """Catches brackets that cost the square of their number where a program has raised its limit of recursion."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        [problem] = problems_of(files=(write(tmp_path / "deep.yaml", "env: " + "[" * 3000),))
    finally:
        sys.setrecursionlimit(limit)
    assert "nested deeper than 100 levels" in problem
    assert problems_of("env.kwargs={a: " + "[" * 90 + "]" * 90 + "}") == []


@given(text=st.text(max_size=40))
def test_any_text_is_a_file_or_a_problem(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Catches what the YAML parser raises besides its own errors."""
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    file.write_text(text, encoding="utf-8")
    assert isinstance(load_config((file,), (text,))[0], Config)


def test_names_of_other_systems_lead_to_settings() -> None:
    """Catches a hint at a setting that has been renamed, and a name that is one of ours."""
    every = set(_all_paths())
    assert set(_ELSEWHERE.values()) <= every
    assert not set(_ELSEWHERE) & {path.split(".")[-1] for path in every}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CartPole-v1"], "argument 'CartPole-v1': expected key=value, e.g. env.id=CartPole-v1"),
        (["my_env:Env"], "e.g. env.id=my_env:Env"),
        (["hello"], "e.g. learner.batch_size=64"),
        (["--env.id=CartPole-v1"], "settings have no dashes; expected env.id=CartPole-v1"),
        (
            ["--seed", "3"],
            "1 problem, nothing was started:\n  argument '--seed 3': settings have no dashes; expected seed=3",
        ),
        (["--seed"], "argument '--seed': settings have no dashes; expected seed=VALUE"),
        (
            ["--env", "CartPole-v1"],
            "argument '--env CartPole-v1': settings have no dashes; expected env.id=CartPole-v1",
        ),
        (["--policy=my_nets:Net"], "settings have no dashes; expected policy.kind=my_nets:Net"),
        (["--seed", "seed=3"], "argument '--seed': settings have no dashes; expected seed=VALUE"),
        (["--env.kwargs={a: 1}"], "settings have no dashes; expected env.kwargs={a: 1}"),
        (["-learner.gamma=0.9"], "settings have no dashes; expected learner.gamma=0.9"),
    ],
    ids=str,
)
def test_settings_written_as_elsewhere_are_told_how_to_write_them(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a newcomer's first command, answered by a usage or by an example of something else."""
    for command in (["train"], ["doctor"], ["config", "show"]):
        assert main([*command, *words, "metrics.port=-1"]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", "somewhere", "--seed"])
    assert "unrecognized arguments: --seed" in capsys.readouterr().err
