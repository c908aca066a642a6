"""What this process has: which Triton, whether it compiles or interprets the kernels, and FUSED_LSTM_DEBUG."""

import os
from typing import Any

OLDEST = (3, 6)

# Every wait of one program for another is then bounded, and sizes on a device are looked at.
DEBUG = os.environ.get("FUSED_LSTM_DEBUG") == "1"

# The kernels run on AMD's devices, too, where nobody has seen them run.
ROCM = os.environ.get("FUSED_LSTM_ROCM") == "1"

TRITON: str | None = None
VERSION: tuple[int, ...] = ()
WHY_NO_TRITON: str | None = None
_probe: Any = None
try:
    import triton
except ImportError as _error:
    WHY_NO_TRITON = "Triton is not installed" if _error.name == "triton" else f"Triton cannot be imported ({_error})"
else:
    TRITON = triton.__version__
    VERSION = tuple(int(part) for part in TRITON.split(".")[:2])
    if VERSION < OLDEST:
        WHY_NO_TRITON = f"Triton {TRITON} is older than {'.'.join(map(str, OLDEST))}"
    else:

        @triton.jit
        def _probe():
            pass


def interpreted() -> bool:
    """True where TRITON_INTERPRET=1 was set before triton was imported: the kernels then run on CPU tensors."""
    return _probe is not None and not isinstance(_probe, triton.JITFunction)


def _mend_interpreter() -> None:
    """Sets right what makes the interpreter of some Tritons refuse a kernel that the compiler takes."""
    import numpy
    from triton.runtime import interpreter

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        # 3.9 casts a comparison, whose handle has the type of its operands, to that type, and refuses it as a mask.
        value = scalar.data.reshape(-1)[0]
        return interpreter.TensorHandle(numpy.full(block.shape, value, dtype=scalar.data.dtype), scalar.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat
    if VERSION < (3, 7):
        patch_tensor = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            # 3.6 makes an integer of an array of one dimension, which NumPy 2.4 refuses.
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched


if interpreted():
    _mend_interpreter()
