"""What makes pages of the documentation lies beside them, in docs/."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs"))
