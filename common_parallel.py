"""Worker processes. Without torch, so that a script can have them get ready while it still imports it itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, Any

from common_options import UserError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

    from common_run import Runtime

Parallel = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[tuple[int, Any]]]  # see worker_pool


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; processes started in it never hear of it: it is the parent's business.

    The mask of this thread is what those processes inherit; the handler is for a Ctrl-C that reaches another thread.
    """
    caught: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if caught and callable(handler):
        handler(*caught[0])


def worker_context() -> ForkServerContext | SpawnContext:
    """How worker processes are started: forked from a server that has imported torch and has no threads.

    (Torch's threads do not survive a fork.) The first call returns at once, but then the server imports for seconds:
    call it early. Where there can be none (Windows has no fork, macOS' own libraries may not survive one; or there is
    no room for its socket) each worker imports torch itself.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo"])  # torch, and what its optimizers import at their first step
        resource_tracker.ensure_running()  # by itself: starting it, multiprocessing lets Ctrl-C through again
        with contextlib.suppress(OSError), interrupts_held():
            forkserver.ensure_running()
            return context
    return multiprocessing.get_context("spawn")


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does, however that ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_worker(runtime: Runtime) -> None:
    from common_run import make_runtime

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    end_with_parent()
    make_runtime(runtime.device, runtime.precision, 1)


@contextlib.contextmanager
def worker_pool(workers: int, runtime: Runtime, spawned: bool = False) -> Iterator[Parallel]:
    """Up to ``workers`` processes of one thread each, which stay for several lists of jobs.

    Yields run(function, jobs), which runs ``function(*job)`` in them and yields (job number, result) as they end.
    Ctrl-C or an exception in the caller stops the workers. ``spawned``: each is a new interpreter that imports torch
    itself and so lays out its memory anew; forked from one server they are alike, and so are their timings.
    """
    context = multiprocessing.get_context("spawn") if spawned else worker_context()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (runtime,))  # starts them as they are needed

    def run(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        with interrupts_held():
            futures = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def run_parallel(
    function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int, runtime: Runtime, spawned: bool = False
) -> Iterator[tuple[int, Any]]:
    """One list of jobs in a ``worker_pool`` of its own."""
    with worker_pool(workers, runtime, spawned) as run:
        yield from run(function, jobs)
