from pathlib import Path

from setuptools import setup

setup(
    name="fused-lstm",
    version="0.1.0",
    description="A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6"],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "numpy", "expecttest"],
        # Programs that use nn.LSTM, and ONNX: what the tests swap and export.
        "libraries": ["transformers", "sb3-contrib", "stanza", "onnx", "onnxscript", "onnxruntime"],
        "examples": ["matplotlib", "tqdm"],
        "lint": ["ruff", "mypy"],
    },
    packages=["fused_lstm", "fused_lstm.kernels"],
    # The kernels stand at the top of the repository for the reader; they are imported as
    # fused_lstm.kernels, because the bare name belongs to another package on PyPI.
    package_dir={"fused_lstm": "fused_lstm", "fused_lstm.kernels": "kernels"},
    package_data={"fused_lstm": ["py.typed"]},
)
