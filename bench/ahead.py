"""`python -m bench.ahead`: compiles, for a device that is not there, all that a run on it would compile.

tests   what the tests marked `gpu` launch
sweep   the cases of bench.run, with the providers of ours
lab     the micro-benchmarks of bench.lab, and the recurrence kernels with the tiles that the plans choose
plans   those with the tiles among which tune() chooses, in the sizes of the sweep

The kernels go into an archive, which unpack() makes a Triton cache of, anywhere. With --check they are asked for again
from an unpacked archive, and what misses is counted. With --H one size goes into Triton's own cache instead, so that
nothing is compiled where a container starts.

A kernel is found again by Triton's own files, its source, ptxas and the options; launchers also by Python's version.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

from fused_lstm import LSTM, tuning
from fused_lstm.kernels.tiles import DEVICES, H100, Device

from . import cases, lab, measure, micro, plans, store, tune
from .absent import CPU, gpu_target, without_device
from .providers import PROVIDERS
from .timing import Times

ARCHIVE = store.ROOT / "build" / "ahead.tar.xz"
MANIFEST = "manifest.json"
KEPT = (".cubin", ".json")  # of a kernel; its intermediate forms are many times as large

# What is compiled: each is called in a process of its own kind, by its arguments


class Job(NamedTuple):
    call: Callable[..., None]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class AbsentLab(micro.Lab):
    """The lab of a device that is not there: nothing is timed."""

    of: Device = H100
    dry = False

    @property
    def hardware(self) -> Device:
        return self.of

    def slope(self, call: Callable[[int], object], steps: int, less: Any = None, **options: Any) -> Times:
        for each in filter(None, (call, less)):
            each(1)
        return Times(1.0, 1.0, 1.0, 1)


def lab_item(device: Device, item: lab.Item) -> None:
    here = AbsentLab(CPU, of=device)
    if item.part == "tune":
        params, dtype = item.params, cases.DTYPES[item.params["dtype"]]
        asked = tune.with_tiles(here, item.name, params)
        with patch.object(tune, "Compiler", lambda capability: triton.runtime.driver.active):
            tune.compile_ahead(device.capability, item.name, asked, dtype, params["H"], params["B"])
        return
    # Nothing ran: what is found wrong must not keep the next kernel from being launched, as far as that can be.
    with patch.object(torch.testing, "assert_close", lambda *args, **keywords: None), suppress(micro.Wrong):
        lab.PARTS[item.part].measure(here, item.name, item.params)


def plans_item(item: lab.Item) -> None:
    """What tune() launches, of which nothing is timed, nor looked at."""
    small = item._replace(params=item.params | {"T": min(item.params["T"], 2)})
    unasked = {"mismatch": lambda *args: "", "microseconds": lambda call: 1.0}
    with patch.multiple(tuning, **unasked):
        plans.measure(AbsentLab(CPU), small.name, small.params)


def sweep_row(case: cases.Case, provider: str) -> None:
    """What measure.check() and measure.steps() launch; no size but H and the dtype makes another kernel."""
    small = replace(case, T=1 if case.mode == "one step" else 2)
    backward = case.mode == "forward+backward"
    with measure.precision(case.dtype), torch.set_grad_enabled(backward):
        lstm, x, hx = measure.build(small, CPU)
        module = PROVIDERS[provider].build(lstm)
        if getattr(module, "recompute", False):
            module.recompute = 1
        measure.parity.run(measure.called(small, module), x, hx, backward=backward)
        measure.step(small, measure.called(small, module), x, hx)()


def module_of(options: dict[str, Any], B: int, dtype: str, layouts: bool) -> None:
    """Forward and backward, inference, and one step of it; layouts: also with lengths, and with resets."""
    with measure.precision(dtype):
        T, torch_dtype = 2, cases.DTYPES[dtype]
        module = LSTM(**options, dtype=torch_dtype)
        x = torch.randn(T, B, module.input_size, dtype=torch_dtype)
        lengths, reset = torch.ones(B, dtype=torch.int64), torch.zeros(T, B, dtype=torch.bool)
        every = [{}, {"lengths": lengths}, {"reset": reset}, {"lengths": lengths, "reset": reset}]
        for keywords in every if layouts else every[:1]:
            module(x, **keywords)[0].sum().backward()
            with torch.no_grad():
                module(x, **keywords)
        with torch.no_grad():
            module(x[:1])


def jobs(part: str, device: Device) -> list[Job]:
    """What a part has compiled, beside what `gpu_tests` runs."""
    if part == "tests":
        # The sizes of tests/test_device.py, whose runs are long.
        sizes = [(100, 16), (512, 16), (1024, 16), (256, 4), (20, 1)]
        module = lambda H: {"input_size": 64, "hidden_size": H}  # noqa: E731
        return [Job(module_of, (module(H), B, name, H == 512)) for name in cases.DTYPES for H, B in sizes]
    if part == "sweep":
        ours = [name for name in PROVIDERS if name.startswith("fused_lstm") and "graph" not in name]
        return [Job(sweep_row, (case, name)) for case in cases.GPU for name in ours if PROVIDERS[name].runs(case)]
    if part == "plans":
        return [Job(plans_item, (item,)) for item in lab.listed(AbsentLab(CPU), ["plans"])]
    items = lab.listed(AbsentLab(CPU, of=device), [part for part in lab.PARTS if part != "plans"])
    return [Job(lab_item, (device, item)) for item in items if item.params.get("chosen", True)]


PARTS = ("tests", "sweep", "lab", "plans")


def gpu_tests(device: str, processes: int) -> None:
    """Runs the tests marked `gpu` on a faked device, and those of the grid as under FUSED_LSTM_DEBUG=1."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.faked", "-p", "no:cacheprovider", "-q", "-rN", "--tb=no"]
    command += ["-m", "gpu and not slow", "--continue-on-collection-errors", "--disable-warnings"]
    command += ["-o", "addopts=--strict-markers"]  # pyproject's own ask for a plugin that may not be there
    command += ["-n", str(processes)] if processes > 1 and find_spec("xdist") else []
    environment = os.environ | {"FAKED_DEVICE": device}
    every, grid = ["tests", "--ignore", "tests/test_device.py"], ["tests/test_kernels.py", "-k", "test_grid"]
    subprocess.run([*command, *every], cwd=store.ROOT, env=environment | {"FUSED_LSTM_DEBUG": "0"})
    subprocess.run([*command, *grid], cwd=store.ROOT, env=environment | {"FUSED_LSTM_DEBUG": "1"})


def _begin(device: Device) -> None:
    torch.set_num_threads(1)
    without_device(device)


def fill(parts: list[str], device: str, processes: int, more: list[Job]) -> int:
    """Compiles into TRITON_CACHE_DIR; returns how many jobs failed."""
    failed, start = 0, time.time()
    if "tests" in parts:
        gpu_tests(device, processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (DEVICES[device],)) as pool:
        every = [*more, *(job for part in parts for job in jobs(part, DEVICES[device]))]
        waiting = {pool.submit(job.call, *job.args): job for job in every}
        for count, done in enumerate(as_completed(waiting), 1):
            if error := done.exception():
                failed += 1
                print(f"{waiting[done].args}: {type(error).__name__}: {error}", flush=True)
            if count % 50 == 0 or count == len(every):
                print(f"{count} of {len(every)} calls, {time.time() - start:.0f} s", flush=True)
    return failed


# The archive


def _stored(cache: Path) -> dict[str, bytes]:
    """What an archive keeps of a cache by its name there: no intermediate forms, and groups without their folder."""
    found = {}
    for path in sorted(cache.glob("*/*")):
        if path.name.startswith("__grp__"):
            children = json.loads(path.read_text())["child_paths"]
            kept = [name for name in children if name.endswith(KEPT)]
            found[f"{path.parent.name}/{path.name}"] = json.dumps(kept).encode()
        elif path.name.endswith((*KEPT, ".so")):
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


def manifest(capability: tuple[int, ...]) -> dict[str, Any]:
    """What must be the same where an archive is used, by a name for people."""
    source = [path.read_bytes() for path in sorted((store.ROOT / "kernels").glob("*.py"))]
    return {
        "Triton": triton.__version__,
        "Triton's files": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas and architecture": make_backend(gpu_target(capability)).hash(),
        "Python": sysconfig.get_config_var("EXT_SUFFIX"),
        "the kernels' source": hashlib.sha256(b"".join(source)).hexdigest(),
    }


def pack(cache: Path, archive: Path, device: Device) -> int:
    """Makes an archive of a cache; returns how many kernels it has."""
    files = _stored(cache)
    kernels = sum(name.endswith(".cubin") for name in files)
    about = manifest(device.capability) | {"kernels": kernels, "capability": list(device.capability)}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f"{archive.name}.{os.getpid()}")
    with tarfile.open(partial, "w:xz") as tar:
        for name, data in {MANIFEST: json.dumps(about, indent=1).encode(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    partial.replace(archive)
    return kernels


def unpack(archive: Path, cache: Path) -> str:
    """Adds an archive's kernels to a cache; returns what there is to say, in a line: of a bad archive, that too."""
    if not archive.exists():
        return f"no kernels compiled ahead: there is no {archive.name}"
    try:
        about: dict[str, Any] = {}
        with tarfile.open(archive, "r:xz") as tar:
            for entry in tar:
                data = tar.extractfile(entry).read()  # type: ignore[union-attr]
                if entry.name == MANIFEST:
                    about = json.loads(data)
                    continue
                key, name = entry.name.split("/")
                if not key.isalnum() or name.startswith("."):
                    raise ValueError(f"{entry.name} is no file of a cache")
                folder = cache.absolute() / key
                folder.mkdir(parents=True, exist_ok=True)
                if name.startswith("__grp__"):
                    children = {child: str(folder / child) for child in json.loads(data)}
                    data = json.dumps({"child_paths": children}).encode()
                (folder / name).write_bytes(data)
        there = store.smi("compute_cap")  # torch would make a CUDA context to say so
        here = manifest(tuple(map(int, there.split("."))) if there else tuple(about["capability"]))
        kernels = f"{about['kernels']} kernels compiled ahead"
        differ = [f"{name} ({about[name][:16]}, here {own[:16]})" for name, own in here.items() if about[name] != own]
    except Exception as error:  # whatever it holds: without it the kernels are compiled where they are launched
        return f"no kernels compiled ahead: {archive.name} is of no use: {type(error).__name__}: {error}"
    if differ:
        return f"{kernels}, but here some are compiled anew: not the same {'; '.join(differ)}"
    return f"{kernels}, as this machine's Triton would"


def compiled(cache: Path) -> set[tuple[Path, int]]:
    """What a compiler has made in a cache, and when: kernels, launchers and Triton's own module."""
    return {(path, path.stat().st_mtime_ns) for path in cache.glob("*/*") if path.suffix in (".cubin", ".so")}


# The command line


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ahead", description=__doc__.partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--archive", type=Path, help=f"default: {ARCHIVE.relative_to(store.ROOT)}; with --H: none")
    parser.add_argument("--check", action="store_true", help="ask again, from the archive, and count what misses")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    own = parser.add_argument_group("one size, into Triton's own cache: forward, backward, inference and one step")
    own.add_argument("--H", type=int, help="hidden units")
    own.add_argument("--B", type=int, default=16, help="batch rows (default: 16)")
    own.add_argument("--I", type=int, help="input features (default: H)")
    own.add_argument("--dtype", choices=cases.DTYPES, default="bf16")
    own.add_argument("--layers", type=int, default=1)
    own.add_argument("--directions", type=int, choices=(1, 2), default=1)
    own.add_argument("--proj", type=int, default=0, help="features of a projection")
    own.add_argument("--layouts", action="store_true", help="also with lengths and resets")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {' '.join(sorted(unknown))}; there are {' '.join(PARTS)}")
    if args.H is None:
        args.parts, args.archive = args.parts or list(PARTS), args.archive or ARCHIVE
    elif args.check and args.archive is None:
        parser.error("--check needs an --archive")
    return args


def main() -> int:
    """Runs the command line; returns 1 if something was not compiled, or with --check if something missed."""
    args = _arguments()
    device, sizes = DEVICES[args.device], []
    if args.H is not None:
        options = {"input_size": args.I or args.H, "hidden_size": args.H, "num_layers": args.layers}
        options |= {"bidirectional": args.directions == 2, "proj_size": args.proj}
        sizes = [Job(module_of, (options, args.B, args.dtype, args.layouts))]
    os.environ["TRITON_INTERPRET"] = "0"
    with tempfile.TemporaryDirectory() as temporary:
        if args.check:
            cache = Path(temporary)
            print(unpack(args.archive, cache))
        elif args.archive:
            # What was interrupted goes on: a folder of its own for what has to be the same.
            key = hashlib.sha256(json.dumps(manifest(device.capability)).encode()).hexdigest()[:12]
            cache = args.archive.with_name(f"{args.archive.name.partition('.')[0]}-{key}")
        else:
            cache = Path(triton.knobs.cache.dir)
        os.environ["TRITON_CACHE_DIR"] = str(cache.absolute())
        before, start = compiled(cache), time.time()
        failed = fill(args.parts, args.device, args.jobs, sizes)
        found = compiled(cache) - before
        if args.check:
            print(f"{sum(path.suffix == '.cubin' for path, _ in before)} kernels, {len(found)} misses")
            for path, _ in sorted(found):
                print(f"missed: {path.relative_to(cache)}")
            return int(bool(found or failed))
        print(f"{len(found)} kernels and launchers compiled for {args.device} in {time.time() - start:.0f} s")
        if args.archive:
            kernels = pack(cache, args.archive, device)
            print(f"{args.archive}: {kernels} kernels, {args.archive.stat().st_size / 2**20:.1f} MB")
        return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
