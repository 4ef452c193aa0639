"""The environment that OpenMP reads as torch is loaded, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CHOSEN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
SHOW = f"import json, os; print(json.dumps({{n: os.environ[n] for n in {NAMES} if n in os.environ}}))"


def settings_after(code: str, **given: str) -> dict[str, str]:
    """What a fresh process says of its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def test_set_before_torch_is_loaded():
    assert settings_after(f"import sys, tars_fast; assert 'torch' not in sys.modules; {SHOW}") == CHOSEN
    assert settings_after(f"import tars_fast.train; {SHOW}") == CHOSEN


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_the_users_is_left_alone(name):
    assert settings_after(f"import tars_fast; {SHOW}", **{name: "7"}) == {name: "7"}


def test_children_inherit_it():
    child = f"import subprocess, sys, tars_fast; subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)"
    assert settings_after(child) == CHOSEN


def test_others_who_import_the_kernels_keep_their_own():
    assert settings_after(f"import tars_kernels; {SHOW}") == {}
