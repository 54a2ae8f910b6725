"""Is fastattn right, and how fast is it, on the GPU of this machine: ``python -m gpu_check --out FOLDER``."""

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# The tests are a folder without __init__.py: any package of that name among those installed would come first.
_tests = ModuleType("tests")
_tests.__path__ = [str(ROOT / "tests")]
sys.modules.setdefault("tests", _tests)
