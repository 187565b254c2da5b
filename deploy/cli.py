"""The command line. Commands import heavy libraries only after they checked their arguments."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shoal import __version__
from shoal.deploy.evaluation.arguments import add_arguments
from shoal.deploy.records.warnings_handler import WarningsHandler
from shoal.problems import problems_of

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
BENCHMARKS = Path(__file__).resolve().parent.parent / "tests" / "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done, 1: failed, 2: bad input; 128 + n: interrupted by signal n (SIGHUP, SIGINT, SIGUSR1, SIGTERM, SIGXCPU), and
    a run has saved.
    """
    options, unknown = _parser().parse_known_args(arguments)
    if unknown and hasattr(options, "settings"):
        from shoal.deploy.settings.written import as_written

        words = sys.argv[1:] if arguments is None else list(arguments)
        options.settings = as_written(words, unknown, options.settings)  # which is told how they are meant
    elif unknown:
        _parser().parse_args(arguments)  # which ends with the usage
    if (here := os.getcwd()) not in sys.path:
        # Users keep environments here; it comes last, so that a folder named like an installed package hides nothing.
        sys.path.append(here)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks, in a file name perhaps, is written as an escape.
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(handlers=[WarningsHandler()])
    code = 0
    lost: OSError | ValueError | None = None
    try:
        code = options.command(options)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone takes no message
            print("shoal: interrupted", file=sys.stderr)
    except OSError:
        if (lost := _flush("\n")) is None:
            raise  # of something else than standard output
    lost = lost or _flush()
    if lost is None or isinstance(lost, BrokenPipeError):
        return code  # a reader that has read enough (| head) is no failure
    print(f"shoal: the output could not be written: {lost}", file=sys.stderr)
    return code or EXIT_FAILED


def _flush(last: str = "") -> OSError | ValueError | None:
    """Write ``last`` to standard output and flush it; where that fails, return the error and lose the rest."""
    from shoal.deploy.training.screen import discard

    try:
        sys.stdout.write(last)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        return error
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description="Distributed rollouts and learning for recurrent policies."
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a policy",
        description="Train a policy. Settings come from the defaults, then from files, then from key=value; also in a "
        "run that goes on, where --config RUN/config.yaml takes those of its last session.",
    )
    _add_config_arguments(train)
    train.set_defaults(command=_train)

    doctor = commands.add_parser(
        "doctor", help="show how a run would be laid out on this machine, why, and what would stop it"
    )
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="act and learn for some seconds, to measure how many actors one learner can train with",
    )
    _add_config_arguments(doctor)
    doctor.set_defaults(command=_doctor)

    evaluate = commands.add_parser("evaluate", help="play episodes with a trained policy")
    add_arguments(evaluate)
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser(
        "report",
        help="make an HTML report of one or several runs",
        description="Make one self-contained HTML page. For one run it shows all that the run recorded; for several "
        "runs it compares curves and returns, with 95% intervals over runs that differ only in the seed.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory; several are compared")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html; for several runs ./report.html)"
    )
    report.set_defaults(command=_report)

    replay = commands.add_parser(
        "replay",
        help="make a recorded update again, and show what each segment contributed",
        description="Make a recorded update again, by the learner's own code; say what each segment contributed, and "
        "whether the weights after it are those of the run, bit for bit (exit code 1 where they are not). Without "
        "--update: list what is recorded.",
    )
    replay.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    replay.add_argument(
        "--update",
        metavar="V",
        help="the update that made policy version V; of one that was not made its name in the list, as 7-skipped-9",
    )
    replay.add_argument(
        "--segments",
        type=int,
        default=20,
        metavar="N",
        help="show the N segments with the largest gradients (default 20; 0 shows all)",
    )
    replay.add_argument("--json", action="store_true", help="print one JSON object, with all segments")
    replay.set_defaults(command=_replay)

    config = commands.add_parser("config", help="show, validate, compare or describe configurations")
    actions = config.add_subparsers(required=True, metavar="show|validate|diff|schema")
    for name, help_ in (("show", "print the resolved configuration"), ("validate", "list every problem")):
        action = actions.add_parser(name, help=help_)
        _add_config_arguments(action)
        action.set_defaults(command=_show if name == "show" else _validate)
    diff = actions.add_parser(
        "diff",
        help="print what differs between two configurations",
        description="Print what differs between two configurations, or between one and the defaults.",
    )
    diff.add_argument(
        "named",
        nargs="+",
        metavar="RUN|FILE|key=value",
        help="a run directory, a YAML file or a shipped one by name; all key=value together are one configuration",
    )
    diff.set_defaults(command=_diff)
    actions.add_parser("schema", help="print the JSON schema").set_defaults(command=_schema)

    export = commands.add_parser(
        "export",
        help="write a policy as an ONNX file, its episodes as a Minari dataset, or one unroll as an Arrow file",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    what = export.add_mutually_exclusive_group(required=True)
    what.add_argument("--onnx", type=Path, metavar="FILE", help="one step of the policy, checked; e.g. policy.onnx")
    what.add_argument("--out", type=Path, metavar="FILE", help="one unroll as an Arrow IPC stream, e.g. unroll.arrow")
    what.add_argument(
        "--minari",
        metavar="DATASET",
        help="episodes as a dataset that Minari keeps under this name, e.g. cartpole/shoal-v0",
    )
    export.add_argument("--seed", type=int, default=1, help="of environments and actions (default 1)")
    export.add_argument("--episodes", type=int, default=100, help="of --minari: episodes, one per agent (default 100)")
    export.add_argument(
        "--greedy", action="store_true", help="of --minari: take the most probable action instead of sampling"
    )
    export.add_argument(
        "--max-episode-steps",
        type=int,
        default=10_000,
        metavar="N",
        help="of --minari: truncate episodes that have not ended after N steps (default 10,000)",
    )
    export.set_defaults(command=_export)

    import_ = commands.add_parser("import", help="make a run from saved weights of the original policies")
    import_.add_argument(
        "file", type=Path, metavar="FILE", help="a state_dict, as .safetensors or written by torch.save"
    )
    import_.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run directory")
    import_.add_argument(
        "--describe",
        default="metta-2025-08",
        metavar="FILE",
        help="features and actions that the weights were trained with: a YAML or JSON file, or a name "
        "(default metta-2025-08)",
    )
    import_.add_argument("--first-row", type=int, choices=(0, 1), help="embedding row of the first action")
    import_.add_argument("--env", default="", metavar="ID", help="the environment that the weights are for")
    import_.add_argument("--kind", choices=("fast", "component"), default="fast", help="kind of policy (default fast)")
    import_.set_defaults(command=_import)

    bench = commands.add_parser("bench", help="run a benchmark of tests/bench/ (in a checkout)")
    bench.add_argument("name", metavar="NAME", help="e.g. limit")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for the benchmark, e.g. --json")
    bench.set_defaults(command=_bench)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file, or a shipped one by name; repeatable"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. env.id=recall learner.batch_size=128")


def _train(options: argparse.Namespace) -> int:
    from shoal.deploy.settings.load import load_config

    config, problems = load_config(options.config, options.settings)
    from shoal.deploy.doctor import preflight
    from shoal.deploy.records.run_dir import CannotStart, new_run_dir
    from shoal.deploy.settings.paths import with_absolute_paths

    # Before anything of the user's is imported, which may change the directory.
    config, given = with_absolute_paths(config), Path(config.run_dir or new_run_dir(config.env.id))
    run_dir = given.absolute()
    problems += preflight.check(config, run_dir, problems)
    if problems:
        return _refuse(problems)
    if config.log.format == "json":
        from shoal.deploy.records.json_lines import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    from shoal.actors.ray_watch import RayLost
    from shoal.deploy.training.run import run

    try:
        outcome = run(config, run_dir, shown=given)
    except CannotStart as error:
        return _refuse(problems_of(error))
    except RayLost as error:
        _leave(_fail("the run failed", error, run_dir))
    except Exception as error:  # noqa: BLE001  (every error of a run is reported here, as one line and a file)
        return _fail("the run failed", error, run_dir)
    # A signal after the summary, in the wait for the last scrape, interrupted nothing.
    code = 128 + outcome.interrupted_by if outcome.interrupted_by and outcome.summary["interrupted_by"] else 0
    return _leave(code) if outcome.ray_lost else code


def _leave(code: int) -> NoReturn:
    """End the process at once: what Ray has to do at its end waits for a Ray that is lost."""
    _flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _doctor(options: argparse.Namespace) -> int:
    from shoal.deploy.doctor.examine import examine
    from shoal.deploy.records.run_dir import new_run_dir
    from shoal.deploy.settings.load import load_config
    from shoal.deploy.settings.paths import with_absolute_paths

    config, problems = load_config(options.config, options.settings)
    run_dir = Path(config.run_dir or new_run_dir(config.env.id)).absolute()
    lines, found = examine(with_absolute_paths(config), run_dir, measure=options.measure, known=problems)
    print("\n".join(lines))
    if problems + found:
        return _refuse(problems + found)
    print("ready")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from shoal.deploy.evaluation.evaluate import (
        Recorder,
        checkpoint_side,
        evaluation_setup,
        keywords,
        opponent,
        play_sides,
    )
    from shoal.deploy.evaluation.job_process import JobFailed
    from shoal.deploy.evaluation.matches import evaluate_matches
    from shoal.deploy.evaluation.memory_horizon import HORIZONS, conclusion, horizon_sides, to_record
    from shoal.deploy.evaluation.table import Played, Recorded, lines, recorded, to_json
    from shoal.deploy.evaluation.teams import evaluate_teams
    from shoal.deploy.records.json_file import write_json
    from shoal.deploy.records.run_dir import MEMORY_HORIZON
    from shoal.envs.boundary import EnvironmentFault
    from shoal.learner.checkpoint import CheckpointError, find_saved
    from shoal.policy.remap import NameMap, Remapping

    numbers = {
        "--episodes": options.episodes,
        "--num-envs": options.num_envs,
        "--processes": options.processes,
        "--recordings": options.recordings,
        "--max-episode-steps": options.max_episode_steps,
    }
    problems = [f"{name}: {n} must be at least 1" for name, n in numbers.items() if n is not None and n < 1]
    if options.seed < 0:
        problems.append(f"--seed: {options.seed} must not be negative")
    if problems:
        return _refuse(problems)
    from shoal.deploy.training.screen import printing_to_standard_error

    here = Path.cwd()  # a module of the user's may change it
    with contextlib.ExitStack() as stack:
        if options.json:
            stack.enter_context(printing_to_standard_error())
        try:
            remapping = None
            if options.map_feature is not None or options.map_action is not None:
                remapping = Remapping(
                    NameMap(options.map_feature or (), "--map-feature"),
                    NameMap(options.map_action or (), "--map-action"),
                )
            checkpoint = find_saved(options.run)
            if checkpoint.policies:
                told = evaluate_teams(checkpoint, options, here)
                stack.close()  # from here on standard output has the answer
                print(told)
                return 0
            setup = evaluation_setup(
                checkpoint,
                num_envs=options.num_envs,
                seed=options.seed,
                env_id=options.env,
                env_kwargs=keywords(options.env_kwargs, "--env-kwargs"),
                env_options=keywords(options.env_options, "--env-options"),
                remapping=remapping,
            )
            own = checkpoint_side(
                checkpoint,
                setup,
                label=str(options.run),
                greedy=options.greedy,
                memory_horizon=0 if options.zero_memory else None,
            )
            if options.against:
                told = evaluate_matches(own, options, here)
                stack.close()
                print(told)
                return 0
        except (CheckpointError, ValueError) as error:
            return _refuse(problems_of(error))
        except (EnvironmentFault, JobFailed, OSError) as error:
            print(f"shoal: the evaluation failed: {error}", file=sys.stderr)
            return EXIT_FAILED
        sides, recorders = [own], []
        asked = options.memory_horizon
        try:
            cut = [] if asked is None else horizon_sides(own, asked or HORIZONS)
        except ValueError as error:
            cut, problems = [], [str(error)]
        for word in options.vs:
            try:
                sides.append(opponent(word, own, remapping, here=here))
            except ValueError as error:
                problems.append(str(error))
        for kind in ("video", "replay"):
            if (directory := getattr(options, kind)) is not None:
                try:
                    recorders.append(Recorder(kind, own, here / directory, options.max_episode_steps))
                    stack.callback(recorders[-1].close)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            return _refuse(problems)
        try:
            recordings: list[Recorded] = []
            for recorder in recorders:
                recordings += recorded(*recorder.record(options.recordings))
            episodes = play_sides(
                [*sides, *cut], options.episodes, options.processes, max_episode_steps=options.max_episode_steps
            )
        except (EnvironmentFault, JobFailed, OSError) as error:
            print(f"shoal: the evaluation failed: {error}", file=sys.stderr)
            return EXIT_FAILED
    played, *others = (Played(*one) for one in zip([*sides, *cut], episodes, strict=True))
    said = [] if options.json else lines(played, others, recordings)
    found = to_json(played, others, recordings)
    if cut:
        horizons = others[len(sides) - 1 :]
        found["memory_horizon"] = record = to_record(played, horizons)
        said += ["", f"  {conclusion(played, horizons)}"]
        if (here / options.run / "checkpoints").is_dir():
            try:
                write_json(here / options.run / MEMORY_HORIZON, record)
                said.append(f"  recorded in {options.run / MEMORY_HORIZON}, for shoal report")
            except OSError as error:
                print(f"shoal: the memory horizon is not recorded for shoal report: {error}", file=sys.stderr)
    print(json.dumps(found) if options.json else "\n".join(said))
    return 0


def _report(options: argparse.Namespace) -> int:
    from shoal.deploy.report.command import CannotReport, write_report

    try:
        print(write_report(options.runs, options.out))
    except CannotReport as error:
        return _refuse(problems_of(error))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from shoal.deploy.replay import table
    from shoal.learner.recorded_updates import RecordError, find_recorded

    if options.segments < 0:
        return _refuse([f"--segments: {options.segments} must not be negative"])
    try:
        if options.update is None:
            found, problems = table.list_updates(options.run)
            if options.json:
                print(json.dumps(table.list_to_json(found, problems)))
            else:
                print("\n".join(table.lines_of_list(options.run, found, problems)))
            return 0 if found else EXIT_BAD_INPUT
        from shoal.deploy.training.screen import printing_to_standard_error
        from shoal.learner.replay import replay

        with contextlib.ExitStack() as stack:
            if options.json:  # a loss of the user's may print
                stack.enter_context(printing_to_standard_error())
            made = replay(find_recorded(options.run, options.update))
    except RecordError as error:
        return _refuse(problems_of(error))
    print(json.dumps(table.to_json(made)) if options.json else "\n".join(table.lines(made, options.segments)))
    return 0 if made.is_same else EXIT_FAILED


def _show(options: argparse.Namespace) -> int:
    from shoal.deploy.settings.load import load_config, to_yaml

    config, problems = load_config(options.config, options.settings)
    if problems:
        return _refuse(problems)
    print(to_yaml(config), end="")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from shoal.deploy.settings.load import load_config

    _, problems = load_config(options.config, options.settings)
    if problems:
        return _refuse(problems)
    print("valid (environment, policy, loss, callbacks and sinks are loaded by shoal doctor, not here)")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from shoal.deploy.settings.compared import compare
    from shoal.deploy.settings.load import ConfigError

    try:
        lines = compare(options.named)
    except ConfigError as error:
        return _refuse(error.problems)
    print("\n".join(lines) if lines else "no setting differs")
    return 0


def _schema(_: argparse.Namespace) -> int:
    from shoal.deploy.settings.load import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def _export(options: argparse.Namespace) -> int:
    from shoal.envs.boundary import EnvironmentFault
    from shoal.learner.checkpoint import CheckpointError

    export = _export_onnx if options.onnx else _export_minari if options.minari else _export_unroll
    try:
        print(export(options))
    except (CheckpointError, ValueError, OSError) as error:
        return _refuse(problems_of(error))
    except EnvironmentFault as error:
        print(f"shoal: {error}; nothing was kept", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _export_onnx(options: argparse.Namespace) -> str:
    from shoal.deploy.library.onnx_file import export_onnx

    written = export_onnx(options.run, options.onnx)
    return (
        f"{options.onnx}: {written.bytes:,} bytes; its numbers differ from the policy's by {written.error:.1e} at most"
    )


def _export_minari(options: argparse.Namespace) -> str:
    from shoal.deploy.library.minari_dataset import export_minari

    how = {name: getattr(options, name) for name in ("greedy", "seed", "max_episode_steps")}
    written = export_minari(options.run, options.minari, options.episodes, **how)
    return (
        f"{written.dataset_id}: {written.episodes:,} episodes, {written.steps:,} steps, "
        f"return {written.mean_return:,.2f}; in {written.path}"
    )


def _export_unroll(options: argparse.Namespace) -> str:
    from shoal.deploy.evaluation.evaluate import evaluation_setup
    from shoal.learner.checkpoint import find_checkpoint
    from shoal.policy.weights import flatten_weights

    checkpoint, out = find_checkpoint(options.run), options.out.absolute()
    setup = evaluation_setup(checkpoint, num_envs=None, seed=options.seed)
    worker = setup.make_worker(0, 0)
    payload = worker.rollout(flatten_weights(checkpoint.make_policy(), checkpoint.policy_version))
    worker.close()
    out.write_bytes(payload.tobytes())
    return f"{options.out}: one unroll, {setup.num_envs} slots x {setup.unroll_length} steps, {payload.nbytes:,} bytes"


def _import(options: argparse.Namespace) -> int:
    from shoal.deploy.weights.import_weights import describe, import_weights

    try:
        imported = import_weights(
            options.file,
            options.out,
            description=options.describe,
            first_row=options.first_row,
            env_id=options.env,
            kind=options.kind,
        )
    except (ValueError, OSError) as error:
        return _refuse(problems_of(error))
    print(describe(imported))
    return 0


def _bench(options: argparse.Namespace) -> int:
    script = BENCHMARKS / f"{options.name}.py"
    if not script.is_file():
        names = sorted(p.stem for p in BENCHMARKS.glob("*.py") if not p.stem.startswith("_"))
        found = ", ".join(names) or "none: not a checkout"
        return _refuse([f"benchmark {options.name!r} is unknown; there are: {found}"])
    # In place of this process, so that what ends the command (Ctrl-C, SIGTERM) ends the benchmark and what it started.
    os.execv(sys.executable, [sys.executable, str(script), *options.rest])


def _fail(what: str, error: Exception, directory: Path) -> int:
    import traceback

    print(f"shoal: {what}: {type(error).__name__}: {error}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):  # the directory itself may be the cause
        (directory / "traceback.txt").write_text("".join(traceback.format_exception(error)))
        print(f"  traceback: {directory / 'traceback.txt'}", file=sys.stderr)
    return EXIT_FAILED


def _refuse(problems: Sequence[str]) -> int:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"shoal: {count}, nothing was started:", file=sys.stderr)
    for problem in problems:
        first, *more = [line for line in problem.splitlines() if line.strip()] or [""]
        print(f"  {first}", *(f"    {line}" for line in more), sep="\n", file=sys.stderr)
    return EXIT_BAD_INPUT
