"""The house: what the wheel installs, and where source may lie."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_installs_three_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"p2pllm", "p2pllm_cli", "p2pllm_peers"}
    for package in ("p2pllm", "p2pllm_cli", "p2pllm_peers"):
        assert f"{package}/py.typed" in names


def test_source_roots_are_no_packages() -> None:
    assert not (ROOT / "cli" / "__init__.py").exists()
    assert not (ROOT / "peers" / "__init__.py").exists()


def test_every_module_says_what_lives_there() -> None:
    modules = [*ROOT.glob("p2pllm/**/*.py"), *ROOT.glob("peers/**/*.py"), *ROOT.glob("cli/**/*.py")]
    silent = [str(module.relative_to(ROOT)) for module in modules if not module.read_text().startswith('"""')]
    assert silent == []


def test_scripts_can_be_run() -> None:
    for script in ("scripts/install", "scripts/check", "scripts/test", "scripts/demo", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, script
