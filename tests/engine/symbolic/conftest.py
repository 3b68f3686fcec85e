"""The helpers beside these tests are the package `symbolic`: device, tags, traffic, driver."""

import sys
from pathlib import Path

_PARENT = str(Path(__file__).resolve().parents[1])
if _PARENT not in sys.path:
    sys.path.append(_PARENT)
