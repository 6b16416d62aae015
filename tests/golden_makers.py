"""The scripts that made the golden files, as modules: tests make from them what is too large to store."""

import importlib.util
from pathlib import Path
from types import ModuleType

GOLDEN = Path(__file__).parent / "golden"


def maker(name: str) -> ModuleType:
    """The module `golden/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
