"""The daemon's log: of bounded size, what libraries print included, and whoever follows it loses nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, os, sys
from pathlib import Path
from p2pllm_peers import reporting
reporting.LOG_BYTES = 2000
reporting.log_into(Path(sys.argv[1]))
for number in range(200):
    logging.getLogger("p2pllm.x").info("line %d", number)
    if number % 50 == 49:
        os.write(2, b"a library says %d\\n" % number)
"""


def test_a_full_log_is_put_away(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], check=True)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["daemon.log", "daemon.log.1", "daemon.log.2", "daemon.log.3"]
    assert all(file.stat().st_size < 2200 for file in files)
    text = "".join(file.read_text() for file in [*reversed(files[1:]), files[0]])
    assert "line 199" in files[0].read_text() and "a library says 199" in text
    numbers = [int(line.rpartition(" ")[2]) for line in text.splitlines() if ": line " in line]
    assert numbers == list(range(numbers[0], 200)), "lines were lost or came twice"
