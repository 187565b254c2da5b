"""`shoal report` of one run: the page says what the files say, whatever is in them."""

from __future__ import annotations

import itertools
import json
import math
import os
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import EVERY, RATE, START, Line, config, line, lines, summary, write_run
from report_pages import Document, report
from shoal.deploy.cli import main
from shoal.deploy.report import figure
from shoal.deploy.report.log import read_log
from shoal.deploy.report.recorded_metrics import read_metrics, thin
from shoal.deploy.report.recorded_run import read_run


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Path, list[Line]]:
    """A run that ended well, and its lines."""
    written = lines()
    written[-1]["dropped_env_steps/stale"] = 40
    return write_run(tmp_path / "run", written, ended=summary(written[-1])), written


def test_curves_are_those_of_the_file(ended: tuple[Path, list[Line]]) -> None:
    """Catches a curve of the wrong column, a shifted axis, a point left out."""
    run, written = ended
    page = report(run)
    steps = [entry["env_steps"] for entry in written]
    for key, name, column in (
        ("return", "while training, last 256 episodes", "mean_return"),
        ("episode-length", "episode length", "episode_length_steps/mean"),
        ("entropy", "entropy", "loss/entropy"),
        ("value-loss", "value loss", "loss/value_loss"),
        ("policy-loss", "policy loss", "loss/policy_loss"),
        ("explained-variance", "explained variance", "loss/explained_variance"),
        ("gradient", "gradient norm", "loss/grad_norm"),
        ("parity_check", "actors' against learner's log-probabilities", "log_prob_error"),
        ("staleness", "as the actors stored them", "memory_staleness_ratio/stored"),
        ("lag", "mean", "policy_lag_versions/mean"),
        ("weight-norm", "lstm", "weight_norm/lstm"),
        ("weight-effective-rank", "fc1", "weight_effective_rank/fc1"),
        ("weight-condition-number", "cnn2", "weight_condition_number/cnn2"),
        ("dormant-units-ratio", "critic_1", "dormant_units_ratio/critic_1"),
    ):
        x, y = page.curve(key, name)
        assert x == steps, key
        assert y == pytest.approx([entry[column] for entry in written], rel=1e-5), key


def test_speed_and_shares_are_differences(ended: tuple[Path, list[Line]]) -> None:
    """Catches rates of sums instead of differences, `reduce` counted beside the update it is part of, an actor's
    shares that are summed over all."""
    page = report(ended[0])
    x, y = page.curve("speed", "trained")
    assert x == pytest.approx([EVERY * i / 60 for i in range(1, 31)], rel=1e-5)
    assert y == pytest.approx([RATE] * 30)
    loop = 0.1 + 0.01 + 0.02 + 0.8 + 0.02
    parts = {
        "updating weights": 0.7,
        "waiting for other learners": 0.1,
        "waiting for rollouts, or making them": 0.1,
        "assembling batches": 0.01,
        "checking the memory": 0.02,
        "publishing weights": 0.02,
    }
    assert {t["name"] for t in page.figures["learner-time"]["data"]} == set(parts)
    for name, share in parts.items():
        assert page.curve("learner-time", name)[1] == pytest.approx([share / loop] * 30, rel=1e-4)
    for name in ("stepping environments", "running the policy", "packing trajectories", "the rest"):
        assert page.curve("actor-time", name)[1] == pytest.approx([0.25] * 30, rel=1e-4)


def test_the_headline_is_the_summary(ended: tuple[Path, list[Line]]) -> None:
    """Catches a headline that says other numbers than summary.json, or forgets the bottleneck."""
    run, written = ended
    text = report(run).text
    said = summary(written[-1])
    assert f"{said['mean_return']:.4g}" in text
    assert f"a random policy gets 0.809, {said['mean_return'] / 0.809:.1f} times as much" in text
    assert "9,000/s" in text
    assert f"all of the {said['env_steps']:,}" not in text
    assert "updates take 93% of the learner's time: fewer optimizer steps" in text
    assert "right actors and learner differ by 9.5e-07 at most in log-probabilities (600 checks)" in text
    assert f"balances {said['ledger']['sampled']:,} steps delivered" in text
    assert "dropped: shutdown 4,000" in text


def test_the_page_says_whether_it_learned(tmp_path: Path) -> None:
    """Catches an advice that only the screen had, and none where the run goes on or was killed."""
    written = [
        entry
        | {
            "mean_return_ci95": 1.25,
            "random_return": 21.5,
            "random_return_ci95": 0.5,
            "learning/no_better": 1,
            "learning_problem/value_loss": 1,
            "learning_problem/few_steps": 0,
            "learning_rate": 1e-3 / number,
            "gradient_norm/policy": 0.1,
            "gradient_norm/value": 30.0,
        }
        for number, entry in enumerate(lines(), 1)
    ]
    said = {
        "verdict": "no_better",
        "sentence": "return 21.9; KL 0.01",
        "cause": "value_loss",
        "advice": "after all",
    }
    ended = write_run(tmp_path / "ended", written, ended=summary(written[-1], random_return=21.5, learning=said))
    page = report(ended)
    assert "Is it learning? Return 21.9; KL 0.01." in page.text
    assert "After all." in page.text
    assert "a random policy gets 21.5 \u00b1 0.5" in page.text
    assert page.curve("gradients", "value, times its coefficient")[1] == pytest.approx([30.0] * 30)
    assert page.curve("schedule-learning_rate", "learning_rate")[1][:2] == pytest.approx([1e-3, 5e-4])
    running = report(write_run(tmp_path / "running", written)).text
    assert "the likeliest cause: the value loss drowns the policy's." in running
    assert "a random policy gets 21.5 \u00b1 0.5" in running
    better = said | {"verdict": "better", "cause": None, "advice": ""}
    text = report(write_run(tmp_path / "better", ended=summary(lines()[-1], learning=better))).text
    assert "Is it learning? Return 21.9; KL 0.01." in text
    assert "likeliest" not in text


def test_every_plot_can_be_shown_over_time_and_over_steps(tmp_path: Path) -> None:
    """Catches a time that is not that of the step, one that begins anew after a resume, a nameless axis."""
    first, second = (
        lines(10),
        [line(500 + EVERY * i, session=1, seconds=EVERY * i, before=450_000) for i in range(1, 21)],
    )
    page = report(write_run(tmp_path / "run", [*first, *second]))
    # The second session begins at step 450,000, half of the first, whose later lines are discarded work.
    kept = [(entry["env_steps"], entry["seconds"] / 60) for entry in first if entry["env_steps"] <= 450_000]
    kept += [(entry["env_steps"], (100 + entry["seconds"]) / 60) for entry in second]
    figure = page.figures["return"]
    assert figure["data"][0]["x"] == [steps for steps, _ in kept]
    assert figure["axes"]["time"]["x"][0] == pytest.approx([minutes for _, minutes in kept], rel=1e-5)
    assert figure["axes"]["time"]["layout"]["title"]["text"] == "minutes of training"
    assert figure["axes"]["steps"]["marks"] == [450_000]
    [(before, after)] = [(a, b) for (_, a), (_, b) in itertools.pairwise(kept) if b - a > 0.5]
    assert figure["axes"]["time"]["marks"] == [pytest.approx(before, rel=1e-5)]
    speed = page.figures["speed"]
    at = dict(zip((minutes for _, minutes in kept), (steps for steps, _ in kept), strict=True))
    for moment, step in zip(speed["data"][0]["x"], speed["axes"]["steps"]["x"][0], strict=True):
        if moment > after or moment < before:
            assert step == pytest.approx(at[min(at, key=lambda m: abs(m - moment))], rel=1e-4)
    for key, each in page.figures.items():
        assert {len(x) for x in each["axes"]["time"].get("x", ())} <= {len(trace["x"]) for trace in each["data"]}, key
        assert sorted(each["axes"]) == ["steps", "time"], key


def test_processor_and_memory(tmp_path: Path) -> None:
    """Catches seconds drawn as a sum or over the wrong time, bytes as another unit, and empty plots of old runs."""
    written = lines()
    for entry in written:
        entry["process_cpu_seconds"] = 1.5 * entry["seconds"]
        entry["process_resident_memory_bytes"] = 2**30 + 2**20 * entry["seconds"]
        entry["accelerator_memory_bytes/reserved"] = 3 * 2**30
    page = report(write_run(tmp_path / "run", written))
    x, y = page.curve("processor", "learner")
    assert y == pytest.approx([1.5] * len(y))
    assert x[-1] == pytest.approx(written[-1]["seconds"] / 60)
    assert page.curve("resident-memory", "learner")[1][-1] == pytest.approx(1 + written[-1]["seconds"] / 1024, rel=1e-4)
    assert set(page.curve("accelerator-memory", "reserved by torch")[1]) == {3}
    old = report(write_run(tmp_path / "old"))
    assert not {"processor", "resident-memory", "accelerator-memory"} & set(old.figures)
    assert "Processor and memory" not in old.text


def test_films_are_linked_from_where_the_page_is(tmp_path: Path) -> None:
    """Catches a link that leads nowhere, one that runs something, and a film of elsewhere taken for one of the run."""
    run = write_run(tmp_path / "run")
    films = [run / "films" / "version-000000012-episode-0.mp4", run / "javascript:alert(1)#?-episode-1.mp4"]
    for age, film in enumerate(films):
        film.parent.mkdir(exist_ok=True)
        film.write_bytes(b"")
        os.utime(film, (1e9 - age, 1e9 - age))
    (run / "films" / "gone-episode-0.mp4").symlink_to("nowhere")
    (tmp_path / "elsewhere-episode-0.mp4").write_bytes(b"")
    for out in (run / "report.html", tmp_path / "pages" / "deep" / "one.html"):
        assert main(["report", str(run), "--out", str(out)]) == 0
        page = Document(out.read_text(encoding="utf-8"))
        urls = [a["href"] for tag, a in page.elements if tag == "a" and not a["href"].startswith("#")]
        assert all(url.startswith("./") for url in urls)
        assert [(out.parent / urllib.parse.unquote(url)).resolve() for url in urls] == films
        assert all("#" not in url and "?" not in url for url in urls)
    assert "Films of episodes" not in report(write_run(tmp_path / "other")).text


def test_a_run_that_goes_on_shows_what_a_random_policy_gets(tmp_path: Path) -> None:
    """Catches a baseline that only the summary has, which a run writes at its end."""
    written = lines()
    for entry in written[3:]:
        entry["random_return"] = 0.81
    page = report(write_run(tmp_path / "run", written))
    assert page.curve("return", "a random policy")[1] == [0.81, 0.81]
    assert "a random policy gets 0.81" in page.text
    both = report(tmp_path / "run", write_run(tmp_path / "1", written, settings=config(seed=1)))
    assert both.curve("return", "a random policy")[1] == [0.81, 0.81]


def test_each_of_several_policies_has_its_own_random_one(tmp_path: Path) -> None:
    """Catches one line for both: the mean of what the agents of two policies earn is what nobody earns."""
    for name, value in (("hunters", 2.5), ("runners", 1.5)):
        written = lines(4)
        for entry in written:
            entry["random_return"] = value
        settings = config(policies={"hunters": {"agents": ["h*"]}, "runners": {"agents": ["r*"]}})
        write_run(tmp_path / "run" / "policies" / name, written, settings=settings)
    page = report(tmp_path / "run")
    assert page.curve("return", "a random policy as hunters")[1] == [2.5, 2.5]
    assert page.curve("return", "a random policy as runners")[1] == [1.5, 1.5]
    assert "a random policy gets as hunters 2.5, as runners 1.5" in page.text


def test_plotly_knows_every_figure(tmp_path: Path) -> None:
    """Catches an attribute that plotly.js would ignore."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    one = write_run(tmp_path / "0", evaluations=[{"env_steps": 1e5, "mean_return": 3.0, "return_ci95": 0.5}])
    other = write_run(tmp_path / "1", settings=config(seed=1))
    pages = [report(one), report(one, other)]
    for each in itertools.chain.from_iterable(page.figures.values() for page in pages):
        graph_objects.Figure(data=each["data"], layout=each["layout"])


def test_a_page_needs_nothing_else_and_can_be_heard(ended: tuple[Path, list[Line]]) -> None:
    """Catches something loaded from elsewhere, a plot without words, headings out of order, an id used twice."""
    page = report(ended[0])
    of = {
        name: [a for tag, a in page.elements if tag == name]
        for name in ("html", "title", "script", "img", "h1", "link")
    }
    assert of["html"][0]["lang"] == "en"
    assert len(of["title"]) == len(of["h1"]) == 1
    assert not of["img"]
    assert all("src" not in attributes for attributes in of["script"])
    assert [attributes["href"] for attributes in of["link"]] == ["data:,"]
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    plots = {a["id"]: a for _, a in page.elements if (a.get("id") or "").startswith("plot-")}
    assert plots.keys() == {f"plot-{key}" for key in page.figures}
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in plots.values())
    assert sum(tag == "figcaption" for tag, _ in page.elements) == len(plots)
    for each in page.figures.values():
        assert each["layout"]["xaxis"]["title"]["text"]
        assert each["layout"]["yaxis"]["title"]["text"]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--{{ 7 * 7 }}\x1b[31m\u202e"


def test_texts_from_files_stay_texts(tmp_path: Path) -> None:
    """Catches a name, setting or log line that becomes part of the page's code."""
    written = lines(3)
    for entry in written:
        entry |= {f"dropped_env_steps/{EVIL}": 5, f"weight_norm/{EVIL}": 1.0, f"bottleneck/{EVIL}": 1, EVIL: 3}
        entry |= {f"stage_seconds/{EVIL}": entry["seconds"], f"actor_restarts/{EVIL}": 1}
    settings = config(env__id=EVIL, policy__kind=EVIL, seed=EVIL)
    said = summary(written[-1], interrupted_by=EVIL, limit={"stage": EVIL, "sentence": EVIL}, versions={EVIL: EVIL})
    said["ledger"]["dropped"] = {EVIL: 4000}
    log = [f"2026-11-22 13:00:00,123 WARNING envs.{'x'}: {EVIL}".replace("\n", ""), EVIL]
    runs = [
        write_run(tmp_path / f"<b>{seed}", written, settings=settings | {"x": seed}, ended=said, log=log)
        for seed in (0, 1)
    ]
    (runs[0] / "traceback.txt").write_text(EVIL)
    known = report(write_run(tmp_path / "plain"))
    for page in (report(runs[0]), report(*runs)):
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert len(scripts) == 3
        assert {tag for tag, _ in page.elements} <= {tag for tag, _ in known.elements}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert "49" not in set(page.text.split())
        assert "alert(1)" in page.text
        for trace in itertools.chain.from_iterable(each["data"] for each in page.figures.values()):
            assert "<" not in trace.get("name", "")
        for each in page.figures.values():
            assert "<" not in json.dumps(each["layout"])
    assert "\x1b" not in (runs[0] / "other.html").read_text()
    assert "\u202e" not in (runs[0] / "other.html").read_text()


def test_only_the_pages_own_scripts_may_run(ended: tuple[Path, list[Line]]) -> None:
    """Catches a policy that would let a script run that came in through a file, or anything be loaded."""
    page = report(ended[0])
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert all(source.startswith("'sha256-") for source in rules["script-src"].split())
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src"}


@pytest.mark.parametrize(
    ("tail", "skipped", "torn"),
    [
        (b'{"time": 1, "session": 0, "sec', 1, True),
        (b"\n\n", 0, False),
        (b"nonsense\n[1, 2]\n{}\n\xff\xfe\n", 4, False),
        (b'{"time": 1, "session": 0, "seconds": NaN, "env_steps": 3}\n', 1, False),
        (b'{"time": 1, "session": 0, "seconds": 1, "env_steps": ' + b"9" * 400 + b"}\n", 1, False),
        (b"[" * 100_000, 1, True),
    ],
)
def test_lines_that_cannot_be_read_are_left_out(tail: bytes, skipped: int, torn: bool, tmp_path: Path) -> None:
    """Catches a report that fails on what a killed process left, or that hides it."""
    run = write_run(tmp_path / "run", tail=tail)
    metrics = read_metrics(run / "metrics.jsonl")
    assert (len(metrics), metrics.skipped, metrics.torn) == (30, skipped, torn)
    text = report(run).text
    assert ("cut off" in text) == torn
    assert ("could not be read" in text) == (skipped > 0 and not torn)


def test_what_is_null_or_missing_is_a_gap(tmp_path: Path) -> None:
    """Catches a null that becomes 0, and a label that appears late and shifts its column."""
    written = lines(6)
    written[0]["mean_return"] = None
    del written[2]["mean_return"]
    written[3]["mean_return"] = "3"
    written[4]["loss/late"] = 7.0
    metrics = read_metrics(write_run(tmp_path / "run", written) / "metrics.jsonl")
    x, y = metrics.curve("mean_return")
    assert x.tolist() == [written[i]["env_steps"] for i in (1, 4, 5)]
    assert y.tolist() == [written[i]["mean_return"] for i in (1, 4, 5)]
    assert [a.tolist() for a in metrics.curve("loss/late")] == [[written[4]["env_steps"]], [7.0]]


def resumed_lines() -> list[Line]:
    """A session to 900,000 steps, killed; the next from its checkpoint at 720,000; a third from the end of that."""
    second = [line(200 + 10 * i, session=1, seconds=10.0 * i, before=720_000) for i in range(1, 6)]
    third = [line(400 + 10 * i, session=2, seconds=10.0 * i, before=second[-1]["env_steps"]) for i in range(1, 4)]
    return lines(10) + second + third


def test_sessions_are_joined_by_environment_steps(tmp_path: Path) -> None:
    """Catches curves that run back where a run was resumed from an older checkpoint, counters that fall, time that
    starts again, a resumption that is not marked."""
    written = resumed_lines()
    run = write_run(tmp_path / "run", written)
    metrics = read_metrics(run / "metrics.jsonl")
    assert [(s.start, s.stop, s.first_step, s.repeated) for s in metrics.sessions] == [
        (0, 10, 0, 0),
        (10, 15, 720_000, 180_000),
        (15, 18, 1_170_000, 0),
    ]
    page = report(run)
    x, y = page.curve("return", "while training, last 256 episodes")
    kept = [entry for entry in written if entry["session"] or entry["env_steps"] <= 720_000]
    assert x == [entry["env_steps"] for entry in kept] == sorted(x)
    assert y == pytest.approx([entry["mean_return"] for entry in kept], rel=1e-5)
    assert [shape["x0"] for shape in page.figures["return"]["layout"]["shapes"]] == [720_000, 1_170_000]
    x, y = page.curve("speed", "trained")
    assert x == pytest.approx([i / 6 for i in range(1, 19)], rel=1e-5)
    assert y == pytest.approx([RATE] * 18)
    assert page.figures["speed"]["layout"]["xaxis"]["title"]["text"] == "minutes of training"
    assert [shape["x0"] for shape in page.figures["speed"]["layout"]["shapes"]] == pytest.approx([100 / 60, 150 / 60])
    assert "resumed 2 times" in page.text
    assert "180,000 environment steps had not been saved" in page.text
    assert read_run(run).total("trained_env_steps") == 900_000 + 450_000 + 270_000


def test_a_run_that_began_anew_in_its_directory(tmp_path: Path) -> None:
    """Catches two processes of one session number, the first of which never saved, that are read as one."""
    again = [line(200 + 10 * i, seconds=10.0 * i) for i in range(1, 4)]
    metrics = read_metrics(write_run(tmp_path / "run", lines(5) + again) / "metrics.jsonl")
    assert [(s.start, s.stop, s.repeated) for s in metrics.sessions] == [(0, 5, 0), (5, 8, 450_000)]
    assert metrics.curve("mean_return")[0].tolist() == [entry["env_steps"] for entry in again]


def test_the_last_line_makes_no_rate_of_its_own(tmp_path: Path) -> None:
    """Catches a last line, milliseconds after the one before, whose rate is noise or a division by zero."""
    written = [*lines(5), line(50.0, seconds=50.0), line(50.001, seconds=50.001)]
    page = report(write_run(tmp_path / "run", written))
    assert page.curve("speed", "trained")[1] == pytest.approx([RATE] * 5, rel=1e-3)


def test_one_line_is_enough(tmp_path: Path) -> None:
    """Catches a page that needs two points somewhere, or a number where there is none."""
    written = lines(1)
    written[0] |= {"mean_return": None, "actors_alive": None, "seconds": 0.0, "episode_return/mean": None}
    text = report(write_run(tmp_path / "run", written)).text
    assert "No episode has ended yet." in text


def test_long_runs_are_thinned_but_keep_their_extremes(tmp_path: Path) -> None:
    """Catches a page that grows with the run, and thinning that loses a spike."""
    count = 30_000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for i in range(1, count + 1):
            entry = {"time": START + i, "session": 0, "seconds": i, "env_steps": 100 * i, "trained_env_steps": 100 * i}
            file.write(json.dumps(entry | {"mean_return": math.sin(i / 500), "loss/entropy": 1.5}) + "\n")
            if i == 12_345:
                entry |= {"seconds": i + 0.5, "mean_return": 7.25}
                file.write(json.dumps(entry) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = report(tmp_path)
    x, y = page.curve("return", "while training, last 256 episodes")
    assert len(x) == len(y) <= figure.MOST_POINTS
    assert max(y) == 7.25
    assert x[y.index(7.25)] == 1_234_500
    assert min(y) == pytest.approx(-1, abs=1e-6)
    for trace in itertools.chain.from_iterable(each["data"] for each in page.figures.values()):
        assert len(trace["x"]) <= figure.MOST_POINTS


@pytest.mark.parametrize("count", [5, 1000, 1001, 4321])
def test_thinning(count: int) -> None:
    """Catches a first, last, lowest or highest point that is lost, and an order that is not that of x."""
    rng = np.random.default_rng(count)
    x, y = np.sort(rng.normal(size=count)), rng.normal(size=count)
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 1000
    assert (np.diff(thin_x) >= 0).all()
    assert (thin_x[0], thin_x[-1], thin_y.min(), thin_y.max()) == (x[0], x[-1], y.min(), y.max())
    there = set(zip(x.tolist(), y.tolist(), strict=True))
    assert set(zip(thin_x.tolist(), thin_y.tolist(), strict=True)) <= there


def test_evaluations_are_points_with_their_intervals(tmp_path: Path) -> None:
    """Catches evaluations that are lost, without their interval, or of work that was made again."""
    entries = [
        {"env_steps": steps, "mean_return": value, "return_ci95": half, "episodes": 64}
        for steps, value, half in ((400_000, 5.0, 0.5), (800_000, 6.0, 0.25), (600_000, 7.0, None))
    ]
    run = write_run(tmp_path / "run", evaluations=entries)
    with (run / "evaluation.jsonl").open("a") as file:
        file.write('{"env_steps": 900000, "mean_ret')
    page = report(run)
    assert page.curve("return", "evaluation") == ([400_000, 600_000], [5, 7])
    trace = next(t for t in page.figures["return"]["data"] if t.get("name") == "evaluation")
    assert trace["error_y"]["array"] == [0.5, None]
    assert trace["mode"] == "markers"
    assert "the last of 2" in page.text


def test_what_the_memory_is_used_for(tmp_path: Path) -> None:
    """Catches a record that is drawn in another order, and a damaged one that costs the whole page."""
    run = write_run(tmp_path / "run")
    assert "memory_horizon" not in report(run).figures
    level = {"mean_return": 0.25, "return_ci95": None}
    record = {
        "whole": {"mean_return": 0.9, "return_ci95": 0.1},
        "horizons": [{"steps": 0, **level}, {"steps": 8, **level}],
    }
    (run / "memory_horizon.json").write_text(json.dumps(record))
    figure = report(run).figures["memory_horizon"]
    [trace] = figure["data"]
    assert (trace["x"], trace["y"]) == ([0, 1, 2], [0.25, 0.25, 0.9])
    assert figure["layout"]["xaxis"]["ticktext"] == ["0", "8", "all"]
    assert "shapes" not in figure["layout"]
    for damaged in ("[]", "{", '{"whole": {}}', json.dumps({**record, "horizons": [{"steps": "x"}]}), '{"whole": 3}'):
        (run / "memory_horizon.json").write_text(damaged)
        assert "memory_horizon" not in report(run).figures


def test_how_a_run_ended(tmp_path: Path) -> None:
    """Catches a run that failed, was interrupted or goes on, and is called well; an old summary taken for the last."""
    written = lines()
    goal = config(total_env_steps=written[-1]["env_steps"])
    endings: dict[str, dict[str, Any]] = {
        "all of the 2,700,000 environment steps asked for": {"settings": goal, "ended": summary(written[-1])},
        "after the 4 min 45 s it was given": {
            "settings": config(total_env_steps=9_000_000),
            "ended": summary(written[-1]),
        },
        "interrupted (SIGINT)": {"ended": summary(written[-1], interrupted_by="SIGINT")},
        "it goes on or was killed": {},
    }
    for index, (sentence, given) in enumerate(endings.items()):
        assert sentence in report(write_run(tmp_path / str(index), written, **given)).text
    # The summary belongs to the session before.
    assert "it goes on or was killed" in report(write_run(tmp_path / "old", written, ended=summary(written[5]))).text
    failed = write_run(tmp_path / "failed", written, ended=summary(written[-1]))
    (failed / "traceback.txt").write_text("Traceback\n  ...\nRuntimeError: no actor is left\n")
    assert "It ended as it should" in report(failed).text  # it failed before the session that wrote the summary
    os.utime(failed / "summary.json", (START, START + 300))
    assert "It failed after 2,700,000 of the 2,500,000" in report(failed).text
    assert "RuntimeError: no actor is left" in report(failed).text


def test_a_memory_or_books_that_are_wrong_are_shouted(tmp_path: Path) -> None:
    """Catches alarms that look like everything else, also where the parity check's reading is no number."""
    written = lines()
    bad = summary(written[-1], max_log_prob_error=None)
    bad["ledger"]["trained"] -= 7
    text = report(write_run(tmp_path / "run", written, ended=bad)).text
    assert "WRONG actors and learner differ by no number" in text
    assert "DOES NOT BALANCE 7 steps are missing" in text
    for entry in written:
        entry |= {"log_prob_error": None, "log_prob_error_max": None, "ledger_imbalance_env_steps": 3}
    text = report(write_run(tmp_path / "going-on", written)).text
    assert "WRONG" in text
    assert "DOES NOT BALANCE 3 steps" in text
    before = resumed_lines()
    before[9]["log_prob_error_max"] = 0.02  # the last line of the first session
    said = summary(before[-1])
    assert "WRONG actors and learner differ by 2.0e-02" in report(write_run(tmp_path / "was", before, ended=said)).text


def test_warnings_of_the_log(tmp_path: Path) -> None:
    """Catches warnings that are lost in either format, a traceback cut from its error, a flood listed line by line."""
    text = "2026-11-22 13:00:00,123 {} learner.train: {}"
    plain = [text.format("INFO", "saved"), *(text.format("WARNING", f"actor {i} died") for i in range(500))]
    plain += [text.format("ERROR", "refused"), "Traceback (most recent call last):", "ValueError: boom"]
    event = {"time": START, "event": "log", "level": "WARNING", "logger": "shoal.envs.gym", "message": "slow"}
    as_json = [json.dumps(event), json.dumps(event | {"exception": "Traceback\nKeyError: 1"}), '{"event": "progress"}']
    run = write_run(tmp_path / "run", log=plain + as_json)
    found = read_log(run / "run.log")
    assert (found.warnings, found.errors) == (502, 1)
    told = [(kind.level, kind.count, kind.text) for kind in found.kinds]
    assert told == [
        ("WARNING", 500, "actor 499 died"),
        ("ERROR", 1, "refused\nTraceback (most recent call last):\nValueError: boom"),
        ("WARNING", 2, "slow\nTraceback\nKeyError: 1\n" + '{"event": "progress"}'),
    ]
    assert "502 warnings and 1 error" in report(run).text


def test_lines_of_a_legend_look_different() -> None:
    """Catches two components that look alike."""
    assert len({figure.style(index) for index in range(24)}) == 24
