"""The workloads that are measured, in the order of how much they tell: a deadline cuts off the end."""

from dataclasses import dataclass, replace
from itertools import product

import torch

# fp32 and tf32 differ in cuDNN's switch alone; see measure.precision().
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward+backward", "one step")


@dataclass(frozen=True)
class Case:
    """One workload.

    mode: "forward" (inference, no autograd), "forward+backward" (gradients of the input and of every parameter) or
        "one step" (inference in T calls of one step each, the state handed from call to call).
    T, B, I, H: steps, batch rows, input features, hidden units.
    dtype: a key of DTYPES.
    layers, directions: as num_layers of torch.nn.LSTM, and 2 for bidirectional.
    form: "dense"; or with rows of uneven lengths, unsorted, "packed" (a PackedSequence) or "lengths" (padded: nn.LSTM
        packs and pads again); or "reset" (episodes of 50 steps on average end anywhere: nn.LSTM goes step by step); or
        "alternating" (layers that go back in time and forward by turns, each a module).
    lengths: of uneven rows: "spread" (evenly from T to T / 8), "uniform" (at random from 1 to T) or "one long" (a row
        of T among rows of T / 50).
    proj: features of a projection, as proj_size of torch.nn.LSTM; 0: none.
    cell: of fused_lstm.cells, in a fused_lstm.Recurrent of one layer and direction; "": nn.LSTM's.
    weights: "int8": weights that fused_lstm.quantize() loses nothing of; "": any.
    """

    mode: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    dtype: str
    layers: int = 1
    directions: int = 1
    form: str = "dense"
    lengths: str = "spread"
    proj: int = 0
    cell: str = ""
    weights: str = ""

    @property
    def out(self) -> int:
        """Features of h in each direction."""
        return self.proj or self.H

    @property
    def calls(self) -> int:
        """How often nn.LSTM is called for it: one sequence at a time, or one step."""
        return self.T if self.mode == "one step" or self.form == "reset" else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the input and of the weights."""
        return DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        """All sizes but B, the cell and the weights, in words; what goes without saying (I = H, one layer, one
        direction, lengths spread, nn.LSTM's cell) is left out."""
        parts = [f"T{self.T}", f"H{self.H}"]
        parts += [f"I{self.I}"] if self.I != self.H else []
        parts += [f"P{self.proj}"] if self.proj else []
        parts += [f"L{self.layers}"] if self.layers > 1 else []
        parts += [f"D{self.directions}"] if self.directions > 1 else []
        parts += [self.form] if self.form != "dense" else []
        parts += [self.lengths] if self.lengths != "spread" else []
        parts += [part for part in (self.cell, self.weights) if part]
        return " ".join(parts)


BOTH = ("forward", "forward+backward")
# Of one step, layers and hidden units: those of NVIDIA's kernels for STAC-ML, and two larger ones.
STACKS = ((2, 96), (3, 160), (4, 736), (1, 512), (2, 1024))


def _square(T: int, H: int, B: int, dtype: str, mode: str) -> Case:
    return Case(mode=mode, T=T, B=B, I=H, H=H, dtype=dtype)


# What is kept for backward, as sequences grow: by providers that keep less, too. On a GPU, on a CPU, in a dry run.
_LONG = [_square(T, 512, 16, "bf16", "forward+backward") for T in (256, 1024, 4096, 16384)]
_LONG_ON_CPU = [_square(T, 64, 4, "fp32", "forward+backward") for T in (256, 1024)]
_LONG_IF_DRY = [Case("forward+backward", T=9, B=2, I=5, H=7, dtype="fp32")]
MEMORY = [*_LONG, *_LONG_ON_CPU, *_LONG_IF_DRY]

_MAIN = ("bf16", "tf32")
_ALL = (*_MAIN, "fp16", "fp32")
_ORDERED = [
    *(_square(512, H, B, *rest) for (H, B), *rest in product([(512, 16), (1024, 16), (256, 16)], _ALL, BOTH)),
    *(
        Case(mode, T=512, B=64, I=512, H=512, dtype=dtype, form=form)
        for form, dtype, mode in product(["packed", "lengths", "reset"], _MAIN, BOTH)
    ),
    *(
        Case(mode, T=512, B=16, I=512, H=512, dtype=dtype, layers=2, directions=directions)
        for dtype, directions, mode in product(_MAIN, [1, 2], BOTH)
    ),
    *(
        Case(mode, T=2000, B=64, I=512, H=512, dtype=dtype, form="packed", lengths=lengths)
        for lengths, dtype, mode in product(["uniform", "one long"], _MAIN, BOTH)
    ),
    *(
        Case(mode, T=512, B=16, I=512, H=512, dtype=dtype, layers=layers)
        for layers, dtype, mode in product([4, 6], _MAIN, BOTH)
    ),
    *(
        Case(mode, T=512, B=16, I=H, H=H, dtype=dtype, directions=2)
        for H, dtype, mode in product([512, 256], _MAIN, BOTH)
    ),
    *(
        Case(mode, T=512, B=16, I=512, H=H, dtype=dtype, proj=512)
        for H, dtype, mode in product([2048, 4096], _MAIN, BOTH)
    ),
    *(
        Case(mode, T=512, B=16, I=512, H=512, dtype=dtype, cell=cell)
        for cell, dtype, mode in product(["gru", "vanilla", "slstm", "cifg", "rnn_tanh"], _MAIN, BOTH)
    ),
    *(Case(mode, T=512, B=16, I=64, H=64, dtype="bf16", cell=cell) for cell, mode in product(["gru", "slstm"], BOTH)),
    *(Case(mode, T=512, B=64, I=512, H=512, dtype="bf16", form="packed", cell="gru") for mode in BOTH),
    *(_square(64, H, B, dtype, "one step") for H, B, dtype in product([512, 1024], [1, 16], ("bf16", "fp16", "tf32"))),
    *(
        Case("one step", T=64, B=B, I=H, H=H, dtype=dtype, layers=layers)
        for (layers, H), B, dtype in product(STACKS, [1, 4, 16], ("bf16", "fp16"))
        if layers > 1
    ),
    *(Case("one step", T=64, B=3, I=650, H=650, dtype=dtype, layers=2, directions=2) for dtype in _MAIN),
    *(Case("one step", T=64, B=4, I=1024, H=1024, dtype=dtype, layers=2, proj=256) for dtype in _MAIN),
    *(
        Case("forward", T=512, B=B, I=H, H=H, dtype=dtype, weights="int8")
        for (H, B), dtype in product([(2048, 1), (2048, 16), (1536, 16)], _MAIN)
    ),
    *(
        _square(64, H, B, *rest)
        for B, H, *rest in product([4096, 1024, 8192, 256], [384, 256, 1024, 512], (*_MAIN, "fp16"), BOTH)
    ),
    # A policy over vectorised environments; signal chunks through a basecaller's layers.
    *(
        Case(mode, T=32, B=4096, I=256, H=256, dtype=dtype, form=form)
        for form, dtype, mode in product(["reset", "dense"], (*_MAIN, "fp16"), BOTH)
    ),
    *(
        Case(mode, T=1667, B=1024, I=384, H=384, dtype=dtype, layers=5, form="alternating")
        for dtype, mode in product(("fp16", "bf16"), BOTH)
    ),
    *(
        _square(512, H, B, *rest)
        for (H, B), *rest in product(
            [(512, 1), (512, 64), (1024, 64), (256, 64), (1024, 1), (256, 1), (128, 16), (128, 64), (128, 1)],
            _ALL,
            BOTH,
        )
    ),
    *(Case(mode, T=2048, B=16, I=80, H=650, dtype=dtype) for dtype, mode in product(_MAIN, BOTH)),
    *_LONG,
]
# Last, fp16 beside what has been measured in bf16 alone, where nn.LSTM copies its weights at each call.
_IN_FP16 = [replace(case, dtype="fp16") for case in _ORDERED if case.dtype == "bf16"]
GPU = list(dict.fromkeys([*_ORDERED, *_IN_FP16]))

CPU = [
    *(_square(128, H, B, "fp32", mode) for (H, B), mode in product([(256, 16), (256, 1), (64, 16)], BOTH)),
    *(_square(128, H, B, "fp32", "one step") for H, B in [(256, 1), (256, 16)]),
    Case("one step", T=128, B=1, I=160, H=160, dtype="fp32", layers=3),
    *(Case(mode, T=64, B=8, I=64, H=128, dtype="fp32", layers=2, directions=2) for mode in BOTH),
    *(
        Case(mode, T=128, B=16, I=256, H=256, dtype="fp32", form=form)
        for form, mode in product(["packed", "lengths", "reset"], BOTH)
    ),
    *_LONG_ON_CPU,
]

# Small enough for Triton's interpreter.
DRY = [
    *(Case(mode, T=3, B=2, I=5, H=7, dtype=dtype) for dtype, mode in product(_ALL, MODES)),
    *(Case(mode, T=3, B=2, I=5, H=20, dtype="fp32", layers=2, directions=2, form="packed") for mode in BOTH),
    *(Case(mode, T=3, B=2, I=5, H=20, dtype="fp32", form=form) for form, mode in product(["lengths", "reset"], BOTH)),
    *(
        Case("forward+backward", T=5, B=3, I=5, H=7, dtype="fp32", form="packed", lengths=lengths)
        for lengths in ["uniform", "one long"]
    ),
    *(Case(mode, T=3, B=2, I=5, H=7, dtype="fp32", layers=4) for mode in BOTH),
    *(Case(mode, T=3, B=2, I=5, H=7, dtype="fp32", layers=3, form="alternating") for mode in BOTH),
    Case("one step", T=3, B=2, I=5, H=7, dtype="fp32", layers=3),
    *(Case(mode, T=3, B=2, I=5, H=7, dtype="fp32", proj=3) for mode in BOTH),
    Case("forward", T=3, B=2, I=5, H=7, dtype="fp32", weights="int8"),
    *(Case(mode, T=3, B=2, I=5, H=7, dtype="fp32", cell=cell) for cell, mode in product(["gru", "slstm"], BOTH)),
    Case("forward+backward", T=5, B=3, I=5, H=7, dtype="fp32", form="packed", cell="gru"),
    *_LONG_IF_DRY,
]
