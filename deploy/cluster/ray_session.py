"""Ray for the length of a run: started and stopped on this machine, or a cluster that is running already."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.actors.ray_watch import TOLERANCE_SECONDS, RayLost, RayWatch
from shoal.deploy.cluster.ray_debris import claimed_when_made, remove_debris
from shoal.deploy.cluster.ray_start import start_watched
from shoal.deploy.placement.hardware import available_cores

SMALLEST_STORE_BYTES = 256 * 2**20
UNROLLS_PER_ACTOR_IN_STORE = 8
LOOPBACK = "127.0.0.1"
SHARED_MEMORY = "/dev/shm"
TOLERANCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The variable by which Ray in this process takes another time than ``ray_watch.TOLERANCE_SECONDS``."""
TOKEN, MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"
LEAVE_SECONDS = 20.0
"""How long a process that goes on waits for Ray to let go of it, once Ray is lost."""
SETTLE_SECONDS = 5.0
"""How long calls that wait for a Ray that is lost are waited for, before and after the process is disconnected."""
FREE_SECONDS = 60.0
"""How long its next run waits for that."""

_disconnecting: list[threading.Thread] = []
"""They disconnect this process from a Ray that it lost: a Ray that is started meanwhile would be shut down by them."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RaySession:
    """Placement and address of the processes of a run in Ray."""

    address: str
    """The address at which the run's other processes reach this one."""
    actor_options: dict[str, Any]
    """Ray options of a rollout actor."""
    learner_options: dict[str, Any]
    """Ray options of a peer learner."""
    watch: RayWatch
    """Notices that Ray is lost."""

    def put(self, value: Any) -> Any:
        """Share a value with all processes."""
        return self.watch.put(value, ray.put, (ObjectStoreFullError, OutOfDiskError))


def configure() -> None:
    """Ray's environment variables, before it starts anything; what is set already stays."""
    # Nothing is sent to anybody by a training run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors ask for no GPU; Ray would warn that it will one day stop hiding the GPUs from them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at niceness 15: gradient threads would starve the actors, and then wait for them.
    os.environ.setdefault("RAY_worker_niceness", "0")


def check_shared_memory(store_bytes: int) -> None:
    """Warn where Ray's object store does not fit into shared memory, so that Ray puts it on a disk.

    Ray says so, too, but below the level from which its messages are shown.
    """
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return  # no Linux
    free = found.f_frsize * found.f_bavail
    if free < store_bytes:
        log.warning(
            "%s has %.0f MiB free and Ray's object store takes %.0f MiB: it goes to a disk, and unrolls with it. Make "
            "room there, or start the container with --shm-size=%.1fgb",
            SHARED_MEMORY,
            free / 2**20,
            store_bytes / 2**20,
            1.1 * store_bytes / 2**30,
        )


def join(**options: Any) -> None:
    """``ray.init(**options)``, after which SIGTERM ends this process as elsewhere: with 143, and not with Ray's own 15.

    A run that trains handles signals itself (``deploy.training.interruption``); this is for the time before and after.
    """
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    if threading.current_thread() is threading.main_thread():  # Ray sets no handler in another thread either
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def _own_token(held: threading.Event) -> Iterator[None]:
    """A token for the Ray that is started in the block and ends with it, where none is set up; it stays this process's
    where Ray still holds it after the block (``held``).

    Ray itself would write one to ``~/.ray/auth_token`` and leave it there: a cluster that is started later would ask
    for it on every node. And HOME may be read-only.
    """
    # There is no public path (Ray 2.54 to 2.60), nor a type.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    tokens, mode = AuthenticationTokenLoader.instance(), os.environ.get(MODE)
    tokens.reset_cache()  # that of a Ray that was lost
    if (mode or "token").lower() != "token" or tokens.has_token(ignore_auth_mode=True):
        yield
        return
    os.environ[TOKEN] = secrets.token_hex(32)
    tokens.reset_cache()
    try:
        yield
    finally:
        if not held.is_set():
            os.environ.pop(TOKEN, None)
            tokens.reset_cache()
            if mode is None:  # Ray has set it
                os.environ.pop(MODE, None)
                Config.initialize("")


@contextlib.contextmanager
def watched(advice: str, *, head_may_return: bool = False) -> Iterator[RayWatch]:
    """Watch the Ray that this process is connected to, for the length of the block.

    ``advice`` is said when it is lost. Whether a head that has ended may be started again says ``head_may_return``.
    """
    from ray._private.worker import global_worker  # there is no public path to the raylet's socket (Ray 2.60)

    # A Ray client (ray://) has no node of its own.
    raylet = global_worker.node.raylet_socket_name if global_worker.node else ""
    given = os.environ.get(TOLERANCE, "")
    seconds = float(given) if given.isdecimal() else TOLERANCE_SECONDS
    head = ray.get_runtime_context().gcs_address
    watch = RayWatch(head, raylet, advice, seconds, head_may_return=head_may_return)
    try:
        yield watch
    finally:
        watch.close()


@contextlib.contextmanager
def _ended_with_the_block() -> Iterator[None]:
    """End what the raylet that this process started has started itself, where that is still there after the block.

    Its agents live on for a minute where the head is gone, with nothing to do.
    """
    from ray._private.worker import global_worker

    raylet = global_worker.node.all_processes["raylet"][0].process.pid
    held = []
    with contextlib.suppress(OSError):  # no Linux, or an old one
        for child in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                held.append(os.pidfd_open(int(child)))  # its number may be that of another process by then
    try:
        yield
    finally:
        for process in held:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)


def _session_directory() -> Path:
    """Of the Ray that this process started."""
    from ray._private.worker import global_worker

    return Path(global_worker.node.get_session_dir_path())


def leave(watch: RayWatch, *, owns_process: bool) -> bool:
    """Watch no more, disconnect from Ray, and end what ``ray.init`` started; False where Ray still holds this process.

    Where Ray is lost, ``owns_process`` says that this process ends now and need not be disconnected.
    """
    watch.close()
    if not watch.lost.is_set():
        ray.shutdown()
        return True
    if owns_process:
        _end_processes()
        return False
    # It asks for answers that do not come, each for some seconds.
    _disconnecting.append(threading.Thread(target=_disconnect, args=(watch,), name="ray-shutdown", daemon=True))
    _disconnecting[-1].start()
    return _disconnected(LEAVE_SECONDS)


def _end_processes() -> None:
    """End what ``ray.init`` started in this process, if it did."""
    from ray._private.worker import global_worker

    if global_worker.node:
        global_worker.node.kill_all_processes(check_alive=False, allow_graceful=False)


def _disconnect(watch: RayWatch) -> None:
    """Disconnect from a Ray that is lost, once the calls that wait for it have returned.

    A call that comes later would start a Ray of its own, as Ray does for programs that did not: that is turned off
    while one is still under way.
    """
    from ray._private import auto_init_hook  # Ray's own switch is a variable that it reads when it is imported

    # A call that finds its raylet gone would end this process.
    settled, allowed = watch.settle(SETTLE_SECONDS), auto_init_hook.enable_auto_connect
    if not settled:
        auto_init_hook.enable_auto_connect = False
    _end_processes()
    ray.shutdown()
    if settled or watch.settle(SETTLE_SECONDS):
        auto_init_hook.enable_auto_connect = allowed


def _disconnected(seconds: float) -> bool:
    """Whether this process is free of every Ray that it lost, after a wait of at most ``seconds``."""
    until = time.monotonic() + seconds
    while _disconnecting:
        _disconnecting[0].join(max(until - time.monotonic(), 0.0))
        if _disconnecting[0].is_alive():
            return False
        _disconnecting.pop(0)
    return True


def wait_until_free() -> None:
    """Wait for a Ray that this process lost before to let go of it: call this before another is used.

    Raises:
        RayLost: it does not.
    """
    if not _disconnected(FREE_SECONDS):
        raise RayLost(
            f"the Ray that this process lost before has not let go of it in {FREE_SECONDS:.0f} s; nothing was trained. "
            "Start the program again: the run then goes on from its checkpoint"
        )


@contextlib.contextmanager
def local(
    *,
    num_actors: int,
    num_learners: int,
    unroll_bytes: int,
    accelerator: bool,
    owns_process: bool,
    gone: Callable[[str], object],
) -> Iterator[RaySession]:
    """Ray on this machine, for rollout actors and peer learners.

    A Ray that this process has started or joined already is used, and left running; otherwise one of our own.
    ``owns_process``: this process ends with the run. ``gone``: called where Ray ends while it is started
    (``ray_start``).

    Raises:
        RayLost: it ended while it was started, or one that was lost before still holds this process.
    """
    wait_until_free()
    learner = {"num_cpus": 1, "num_gpus": int(accelerator)}
    if ray.is_initialized():
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # All processes of a local run belong on this machine; where that Ray counts fewer CPUs, they share them.
        num_cpus = int(ray.available_resources().get("CPU", 0.0) >= num_actors + num_learners)
        options = {"num_cpus": num_cpus, "scheduling_strategy": here}
        with watched("Start Ray again; the same run then goes on from its checkpoint") as watch:
            learner |= options
            try:
                yield RaySession(address=LOOPBACK, actor_options=options, learner_options=learner, watch=watch)
            finally:
                if watch.lost.is_set():  # Ray would end this process in a minute
                    leave(watch, owns_process=owns_process)
        return
    configure()
    store = max(SMALLEST_STORE_BYTES, num_actors * unroll_bytes * UNROLLS_PER_ACTOR_IN_STORE)
    check_shared_memory(store)
    with contextlib.ExitStack() as stack:
        held = threading.Event()
        stack.enter_context(_own_token(held))
        claim = stack.enter_context(claimed_when_made(Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray")))
        with _search_path(), start_watched(gone):
            join(
                address="local",
                # Processes are counted here, whatever the number of cores: there may be more of them.
                num_cpus=max(available_cores(), num_actors + num_learners),
                num_gpus=num_learners if accelerator else 0,
                object_store_memory=store,
                include_dashboard=False,
            )
        stack.enter_context(_ended_with_the_block())
        session = _session_directory()
        claim(session)
        for removed in remove_debris(session.parent):
            log.info("removed what a run that is gone left of its Ray: %s", removed)
        watch = stack.enter_context(watched("The same command starts Ray anew and goes on from the checkpoint"))
        try:
            yield RaySession(address=LOOPBACK, actor_options={"num_cpus": 1}, learner_options=learner, watch=watch)
        finally:
            if not leave(watch, owns_process=owns_process):
                held.set()


@contextlib.contextmanager
def _search_path() -> Iterator[None]:
    """Let processes that are started in the block find the modules that this one finds.

    Ray takes along the current directory and that of the script, but not what the program added to ``sys.path``.
    """
    installed = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    own = [path for path in sys.path if os.path.isdir(path) and not _is_below(os.path.realpath(path), installed)]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, (before,))])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _is_below(path: str, places: Collection[str]) -> bool:
    return any(path == place or path.startswith(place + os.sep) for place in places)
