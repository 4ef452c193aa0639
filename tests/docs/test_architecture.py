"""The table of wings in docs/architecture.md is the one that imports are held to."""

from __future__ import annotations

import re

from test_layers import ROOT, WINGS


def test_the_page_has_the_table_of_wings():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+).*\|(.*)\|$", page, re.MULTILINE)
    said = {wing: set(re.findall("|".join(WINGS), allowed)) | {"types"} for wing, allowed in rows}
    assert list(said) == list(WINGS), "in the same order"
    assert said == {wing: allowed | {"types"} for wing, allowed in WINGS.items()}
