"""What a kernel is compiled of: a hash of its device functions, by which a result knows whether it is still of them."""

import ast
import hashlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import fused_lstm.kernels

KERNELS = Path(fused_lstm.kernels.__file__ or "").parent
Place = tuple[str, str]  # a module of kernels/, and a name in it


@cache
def names_of(module: str) -> tuple[dict[str, ast.FunctionDef], dict[str, Place]]:
    """The functions that a module of kernels/ has, and where those names are from that it imports."""
    body = ast.parse((KERNELS / f"{module}.py").read_text(encoding="utf-8")).body
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}, imported


def reached(place: Place, found: dict[Place, str]) -> None:
    """Adds to `found` the text of a device function, without comments, docstring and layout, and of all that it
    calls."""
    module, name = place
    functions, imported = names_of(module)
    if name in imported:
        reached(imported[name], found)
        return
    function = functions.get(name)
    if place in found or function is None or not function.decorator_list:
        return
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    found[place] = ast.unparse(ast.FunctionDef(**{**vars(function), "body": body}))
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            reached((module, node.id), found)


def hash_of(*roots: Any) -> str:
    """A hash of what is compiled for some kernels, and for all device functions of some modules, wherever it stands,
    and of the options that it is compiled with; their tiles are in the results themselves."""
    found: dict[Place, str] = {}
    for root in roots:
        if isinstance(root, ModuleType):
            module = Path(root.__file__ or "").stem
            for name in names_of(module)[0]:
                reached((module, name), found)
        else:
            reached((Path(root.fn.__code__.co_filename).stem, root.fn.__name__), found)
    functions, _ = names_of("launch")
    texts = [*found.values(), ast.unparse(functions["specialization"])]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:12]
