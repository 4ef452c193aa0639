"""Print the lower bound of every package that the extra `dev` brings, as `pip install --requirement` takes them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tars_fast.support.requirements import supported

for name, specifier in supported("dev").items():
    (lowest,) = {bound.version for bound in specifier if bound.operator == ">="}
    print(f"{name}=={lowest}")
