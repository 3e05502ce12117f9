"""One engine of Task 4 in a process of its own: loads a saved model, answers requests for logits and for timings.

It speaks JSON, one line per request and per answer, over standard input and output, and waits for requests
blocked, never spinning, so that an idle engine takes nothing from the one being timed. Nothing here imports
torch before a torch model is asked for: memory and loading time of an ONNX engine are those of a program that
has ONNX Runtime and numpy only.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_CALLS = 3  # before every measurement: another engine has used the caches in between
DIFFERENT_BATCHES = 8  # real pictures, several batches of them, so that no batch is timed from its own cache lines


@dataclass(frozen=True)
class Engine:
    """One row of the comparison: which runtime runs which saved file, and how.

    ``kind`` is "torch" or "onnx"; ``exact`` engines must give torch's logits up to rounding, the others
    (bf16, int8) trade accuracy for speed; ``tuned``: torch gets the folded network in channels_last order, else
    the checkpoint as it is, in torch's default order; ``device`` is "cpu", "cuda" or "cuda:1".
    """

    name: str
    kind: str
    file: Path
    threads: int
    exact: bool = True
    tuned: bool = False
    bf16: bool = False
    compiled: bool = False
    device: str = "cpu"


# ---------------------------------------------------------------- in the script's process


class EngineError(Exception):
    """An engine that cannot load its file or run; the text is its one-line reason."""


class EngineProcess:
    """The script's end of one engine's process."""

    def __init__(self, engine: Engine, pictures: Path) -> None:
        """Start the process; ``pictures`` is a .npy file, uint8 (N, C, H, W)."""
        self.engine = engine
        # Whoever waits for work, be it OpenMP's threads, sleeps; one engine gets as many threads as another.
        threads = str(engine.threads)
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        quiet["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes that would outlive this one
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(engine) | {"file": str(engine.file)}), str(pictures)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the libraries' chatter; what matters comes as an answer
            text=True,
            encoding="utf-8",
            env=os.environ | quiet,
        )

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises EngineError with the engine's reason."""
        assert self.process.stdin
        assert self.process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise EngineError(f"its process ended with status {self.process.wait()} (out of memory?)")
        content: dict[str, Any] = json.loads(answer)
        if "error" in content:
            raise EngineError(content["error"])
        return content

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def engine_processes(engines: list[Engine], pictures: Path) -> Iterator[list[EngineProcess]]:
    """A process per engine, all ended with the block."""
    with contextlib.ExitStack() as stack:
        processes = [EngineProcess(engine, pictures) for engine in engines]
        for process in processes:
            stack.callback(process.stop)
        yield processes


# ---------------------------------------------------------------- in the engine's process

Run = Callable[[Any], np.ndarray]  # a prepared batch -> logits (N, num_classes), back on the CPU
Prepare = Callable[[np.ndarray], Any]  # float32 (N, C, H, W) in [0, 1] -> what ``Run`` takes


def load_torch(engine: Engine) -> tuple[float, Prepare, Run]:
    """(milliseconds of loading, prepare, run) of a checkpoint."""
    import torch

    import common

    common.make_runtime(engine.device, "fp32", engine.threads)
    torch.backends.cudnn.allow_tf32 = False  # "fp32" means fp32, here and in ONNX Runtime's CUDA provider
    start = time.perf_counter()
    checkpoint, _ = common.load_checkpoint(engine.file)
    dtype = torch.bfloat16 if engine.bf16 else torch.float32
    layout = torch.channels_last if engine.tuned else torch.contiguous_format
    model: Any = common.fuse(checkpoint) if engine.tuned else checkpoint
    model = model.to(engine.device, dtype).to(memory_format=layout)
    if engine.compiled:
        from torch._inductor import config as inductor

        inductor.freezing = True  # weights become constants, stored in the layout that the kernels want
        inductor.cpp_wrapper = engine.device == "cpu"  # without Python between kernels: faster at batch 1
        model = torch.compile(model, dynamic=False)  # kernels made for each batch size
    load_ms = 1000 * (time.perf_counter() - start)

    def prepare(batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(batch).contiguous(memory_format=layout)

    @torch.inference_mode()
    def run(batch: torch.Tensor) -> np.ndarray:
        return model(batch.to(engine.device, dtype)).float().cpu().numpy()

    return load_ms, prepare, run


def load_onnx(engine: Engine) -> tuple[float, Prepare, Run]:
    """(milliseconds of loading, prepare, run) of an ONNX file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = engine.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only
    kind, _, number = engine.device.partition(":")
    cuda = ("CUDAExecutionProvider", {"device_id": number or "0", "use_tf32": "0"})
    start = time.perf_counter()
    session = ort.InferenceSession(
        engine.file, options, providers=[cuda] if kind == "cuda" else ["CPUExecutionProvider"]
    )
    load_ms = 1000 * (time.perf_counter() - start)
    if kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("ONNX Runtime's CUDA provider does not start here")  # it would fall back to the CPU
    name = session.get_inputs()[0].name
    return load_ms, np.ascontiguousarray, lambda batch: session.run(None, {name: batch})[0]


def read_pictures(path: Path, start: int, count: int) -> np.ndarray:
    """Pictures [start, start + count) of a .npy file as float32 in [0, 1]; nothing else stays in memory."""
    pictures = np.load(path, mmap_mode="r")
    shape, offset = pictures.shape[1:], pictures.offset
    size = int(np.prod(shape))
    pixels = np.fromfile(path, np.uint8, min(count, len(pictures) - start) * size, offset=offset + start * size)
    return pixels.reshape(-1, *shape).astype(np.float32) / 255


def peak_memory() -> int | None:
    """Peak resident bytes of this process; None where the system does not tell.

    Linux's ru_maxrss will not do: a new process inherits its parent's.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    return None


def time_calls(run: Run, batches: list[Any], calls: int, seconds: float) -> list[float]:
    """Latencies in ms, in order, of at least so many calls and so many seconds, after a warm-up."""
    endless = itertools.cycle(batches)
    for _ in range(WARM_UP_CALLS):
        run(next(endless))
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while len(latencies) < calls or time.perf_counter() < end:
        batch = next(endless)
        start = time.perf_counter()
        run(batch)
        latencies.append(1000 * (time.perf_counter() - start))
    return latencies


class Server:
    """The engine's end: one method per request."""

    def __init__(self, engine: Engine, pictures: Path) -> None:
        self.engine, self.pictures = engine, pictures
        self.count = len(np.load(pictures, mmap_mode="r"))
        self.batches: dict[int, list[Any]] = {}

    def load(self) -> dict[str, Any]:
        """Load the file (importing the libraries before that is not counted) and make the first call."""
        load = {"torch": load_torch, "onnx": load_onnx}[self.engine.kind]
        load_ms, self.prepare, self.run = load(self.engine)
        batch = self.prepare(read_pictures(self.pictures, 0, 1))
        start = time.perf_counter()
        self.run(batch)
        return {"load_ms": load_ms, "first_call_ms": 1000 * (time.perf_counter() - start)}

    def predict(self, batch_size: int, file: str) -> dict[str, Any]:
        """Save the logits of all pictures, float32 (N, num_classes), as .npy ``file``."""
        starts = range(0, self.count, batch_size)
        batches = (self.prepare(read_pictures(self.pictures, start, batch_size)) for start in starts)
        np.save(file, np.concatenate([self.run(batch) for batch in batches]))
        return {}

    def time(self, batch_size: int, calls: int, seconds: float) -> dict[str, Any]:
        """Latencies of calls on several batches of different pictures, prepared before the clock starts."""
        if batch_size not in self.batches:
            starts = range(0, self.count - batch_size + 1, batch_size)[:DIFFERENT_BATCHES]
            self.batches[batch_size] = [self.prepare(read_pictures(self.pictures, s, batch_size)) for s in starts]
        latencies = time_calls(self.run, self.batches[batch_size], calls, seconds)
        return {"latencies_ms": latencies, "peak_rss_bytes": peak_memory()}


def serve(description: str, pictures: str) -> None:
    """Answer requests until the script closes the pipe, be it because it died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the script's business
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    fields = json.loads(description)
    server = Server(Engine(**fields | {"file": Path(fields["file"])}), Path(pictures))
    with contextlib.suppress(Exception):  # loading will say it again; all engines import at the same time
        importlib.import_module({"torch": "common", "onnx": "onnxruntime"}[server.engine.kind])
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(server, arguments.pop("request"))(**arguments)
        except Exception as error:  # whatever a runtime raises, the script shall hear of it
            answer = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
