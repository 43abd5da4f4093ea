"""The repository's folder, which importing this module puts on the import path: benchmarks run from anywhere."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
