"""`pytest -p tests.without_triton`: as where Triton is not installed; torch's own LSTM is then the only path."""

import sys
from importlib.abc import MetaPathFinder


class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")


assert "triton" not in sys.modules
sys.meta_path.insert(0, Absent())
