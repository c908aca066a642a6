from pathlib import Path

from setuptools import setup

TRITON = "triton>=3.6; platform_system == 'Linux'"

setup(
    name="fused-lstm",
    version="0.1.0",
    description="A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # No Triton: torch for CUDA brings the one that it was built with, torch for ROCm a Triton of its own, which PyPI's
    # would overwrite, and macOS and Windows have none. Without Triton torch's own LSTM runs.
    install_requires=["torch>=2.11"],
    extras_require={
        "triton": [TRITON],
        "test": [TRITON, "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "numpy", "expecttest"],
        # Programs that use nn.LSTM, and ONNX: what the tests swap and export.
        "libraries": [
            "transformers",
            "sb3-contrib",
            "stanza",
            "torchrl",
            "thop",
            "ptflops",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
        "examples": ["matplotlib", "tqdm"],
        "lint": ["ruff", "mypy"],
    },
    packages=["fused_lstm", "fused_lstm.cells", "fused_lstm.kernels", "fused_lstm.paths"],
    # The kernels stand at the top of the repository for the reader; they are imported as
    # fused_lstm.kernels, because the bare name belongs to another package on PyPI.
    package_dir={"fused_lstm": "fused_lstm", "fused_lstm.kernels": "kernels"},
    package_data={"fused_lstm": ["py.typed"], "fused_lstm.kernels": ["limits.json", "measured/*.jsonl"]},
)
