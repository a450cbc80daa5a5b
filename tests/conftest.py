"""What the tests of every stage share: the scripts as modules, and the reference's outputs where they are present."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("GPT2_CHINESE_REFERENCE", ROOT.parent / "shared" / "reference"))
CORPORA = REFERENCE.parent / "corpora"

# Tests read what scripts say in English, also on a machine whose locale is Chinese; its encoding stays.
if os.environ.get("LC_ALL"):
    os.environ["LC_CTYPE"] = os.environ.pop("LC_ALL")
os.environ["LC_MESSAGES"] = "C"

# Machines that run tests are shared, so no example is refused for the time that it takes.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def script():
    """Load a script of the top level by its file name, such as "make-vocab", to call its `main([...])` in process."""

    def load(name: str) -> ModuleType:
        module_name = name.replace("-", "_")
        if module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, ROOT / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
        return sys.modules[module_name]

    return load


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the reference's outputs; the test is skipped where it is absent."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference outputs in {REFERENCE}")
    return REFERENCE


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real corpora; the test is skipped where it is absent."""
    if not CORPORA.is_dir():
        pytest.skip(f"no corpora in {CORPORA}")
    return CORPORA
