"""`pytest -p tests.without_triton`: as where Triton is not installed; torch's own LSTM is then the only path."""

import os
import sys
from importlib.abc import MetaPathFinder


class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")


assert "triton" not in sys.modules
os.environ["TRITON_INTERPRET"] = "0"  # of processes that a test starts, in which it is there
sys.meta_path.insert(0, Absent())
