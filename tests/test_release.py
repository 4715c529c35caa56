"""The release's configuration agrees with what pyproject.toml promises. It cannot run here; its parts can be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib")  # Python 3.11

CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, CIBUILDWHEEL = CONFIGURATION["project"], CONFIGURATION["tool"]["cibuildwheel"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
VERSIONS = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))


def test_every_supported_python_gets_a_wheel_that_is_checked():
    assert CIBUILDWHEEL["build"] == [f"cp{version.replace('.', '')}-*" for version in VERSIONS]
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    assert WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["python"] == VERSIONS
    assert ".".join(map(str, sys.version_info[:2])) in VERSIONS


def test_commands_name_what_exists():
    assert "wheel_smoke.py" in CIBUILDWHEEL["test-command"]
    assert (ROOT / "tools/wheel_smoke.py").exists()
    linux = CIBUILDWHEEL["linux"]
    assert linux["environment"]["RD_KERNELS_FORCE_CUDA"] == "1"
    assert re.findall(r"--exclude (\S+)", linux["repair-wheel-command"]) == ["libgomp.so.1"]
    assert set(linux["archs"]) == {
        m["arch"] for m in WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["machine"]
    }


def test_the_oldest_torch_is_used():
    (oldest,) = re.findall(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"]))
    commands = " ".join(step.get("run", "") for step in WORKFLOW["jobs"]["check"]["steps"])
    assert f"--torch {oldest}.0" in commands


def test_only_a_tag_publishes_after_the_checks():
    publish = WORKFLOW["jobs"]["publish"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(publish["needs"]) == {"sdist", "check"}
    assert publish["permissions"] == {"id-token": "write"}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"[\w./-]+@(v\d+|release/v1)", step["uses"]) for step in steps)
