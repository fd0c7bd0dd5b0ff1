"""The fixture `lab`: what it returns, and that nothing survives it. The lab is a stand-in that does as it is told."""

from __future__ import annotations

import textwrap
from pathlib import Path

import psutil
import pytest

from p2pllm.testing import plugin
from p2pllm.testing.plugin import Lab, lab

__all__ = ["lab"]

STAND_IN = """
import json, os, subprocess, sys, time
from pathlib import Path

assert sys.argv[1:3] == ["lab", "run"], sys.argv
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
exec(Path(sys.argv[3]).read_text())
"""
"""Its scenarios are Python."""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stand-in" / "p2pllm_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(plugin, "SETTLE_S", 0.1)


def lines(text: str) -> str:
    return textwrap.dedent(text)


def test_what_came_of_it_is_returned(lab: Lab) -> None:
    result = lab(
        lines("""
        print("hello", sys.argv[6:])
        print("and an error", file=sys.stderr)
        (out / "report.json").write_text(json.dumps({"verdict": {"passed": False}}))
        sys.exit(1)
        """),
        short=True,
        seed=7,
    )
    assert result.code == 1
    assert result.report == {"verdict": {"passed": False}}
    assert result.output == "hello ['--short', '--seed', '7']\nand an error\n"
    assert (result.out / "report.json").exists()


def test_a_scenario_may_be_a_file_and_leave_no_report(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("sys.exit(2)")
    assert [lab(path).code, lab(path).code] == [2, 2]
    assert lab(path).report == {}


def test_it_has_a_machine_of_its_own(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PLLM_LISTEN_PORT", "1234")
    result = lab('print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\\n")')
    variables = dict(line.split("=", 1) for line in result.output.splitlines() if "=" in line)
    assert "P2PLLM_LISTEN_PORT" not in variables
    for name in ("P2PLLM_HOME", "P2PLLM_CACHE", "P2PLLM_CONFIG"):
        assert variables[name].startswith(str(result.out.parent))
    assert not Path(variables["XDG_RUNTIME_DIR"]).exists()


def gone(pid_file: Path) -> bool:
    try:
        return psutil.Process(int(pid_file.read_text())).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_is_left_fails_the_test_and_is_ended(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="The lab left"):
        lab(
            lines(f"""
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
            """)
        )
    assert gone(tmp_path / "pid")


def test_a_socket_that_is_left_fails_the_test(lab: Lab) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"control\.sock"):
        lab('(Path(os.environ["XDG_RUNTIME_DIR"]) / "control.sock").touch()')


def test_a_lab_that_does_not_end_is_interrupted_then_ended(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "END_S", 0.5)
    with pytest.raises(pytest.fail.Exception, match=r"did not end within 1 s.*\n.*it began"):
        lab(
            lines(f"""
            Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
            print("it began", flush=True)
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                Path({str(tmp_path / "interrupted")!r}).touch()
                time.sleep(600)
            """),
            limit_s=1.0,
        )
    assert (tmp_path / "interrupted").exists()
    assert gone(tmp_path / "pid")
