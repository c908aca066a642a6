"""Compiles the kernels for a device that is not there."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fused_lstm.kernels.tiles import H100, Device


class Driver:
    """Triton's driver of a device that is not there: it compiles and loads kernels and launchers, and runs nothing."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, device: Device) -> None:
        self.target = GPUTarget("cuda", 10 * device.capability[0] + device.capability[1], 32)
        self.utils = nvidia.CudaUtils()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def libcuda() -> Path:
    """Builds libcuda.c, once for this user, Triton and source; returns the library."""
    source, include = Path(__file__).with_name("libcuda.c"), Path(nvidia.__file__).parent / "include"
    folder = Path(tempfile.gettempdir(), f"fused-lstm-libcuda-{os.getuid()}-{triton.__version__}")
    library = folder / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        options = ["-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", made, source], check=True)
        made.replace(library)
    return library


def without_device(device: Device = H100) -> Any:
    """Has Triton compile for a device that is not there, from now on in this process; returns the driver."""
    library = libcuda()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)  # the launchers are linked against it
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver = Driver(device)
    triton.runtime.driver.set_active(driver)
    return driver
