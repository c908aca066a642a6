"""A CUDA device that is not there: Triton compiles for it, loads what it has compiled, and a launch does nothing."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fused_lstm import operators, route, tuning
from fused_lstm.kernels import plan
from fused_lstm.kernels.tiles import H100, Device

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def gpu_target(capability: tuple[int, ...], gcn: str = "") -> GPUTarget:
    """What Triton compiles for: a compute capability, or AMD's name for a device."""
    if gcn:
        return GPUTarget("hip", gcn, 64 if gcn.startswith("gfx9") else 32)
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


class Compiler:
    """A driver for Triton that has a target but no device: a launch compiles, into Triton's cache, and then fails."""

    def __init__(self, capability: tuple[int, ...]) -> None:
        self.target = gpu_target(capability)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Driver(Compiler):
    """Triton's driver of a device that is not there: it also loads kernels and launchers, and runs nothing."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, device: Device) -> None:
        super().__init__(device.capability)
        self.utils = nvidia.CudaUtils()


def libcuda() -> Path:
    """Builds libcuda.c, once for this user, Triton and source; returns the library."""
    source, include = Path(__file__).with_name("libcuda.c"), Path(nvidia.__file__).parent / "include"
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"fused-lstm-libcuda-{os.getuid()}-{triton.__version__}-{key}")
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        options = ["-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", made, source], check=True)
        made.replace(library)
    return library


def without_device(device: Device = H100) -> Driver:
    """From now on in this process Triton compiles for a device that is not there, and CPU tensors take the kernels'
    path with its plans. A launch does nothing."""
    library = libcuda()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)  # the launchers are linked against it
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver = Driver(device)
    triton.runtime.driver.set_active(driver)
    plan.cuda_device = lambda asked: device
    plan.choose.cache_clear()

    def asked_of_the_device(question: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **keywords: Any) -> Any:
            return question(*(CUDA if arg == CPU else arg for arg in args), **keywords)

        vars(asked)["cache_clear"] = getattr(question, "cache_clear", None)
        return asked

    for name in ("why_torch", "choose", "layers_together", "in_kernel", "choose_one_step", "alternatives"):
        own = getattr(plan, name)
        asked = asked_of_the_device(own)
        for module in (plan, route, operators, tuning):
            if getattr(module, name, None) is own:
                setattr(module, name, asked)
    route.known_route.cache_clear()
    return driver
