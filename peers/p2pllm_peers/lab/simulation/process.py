"""A simulation in a process of its own, so that its memory can be measured and its result repeated.

`python -m p2pllm_peers.lab.simulation.process JSON` runs one setting: progress and the result go to stdout as lines of
JSON. What does not live here: what is simulated (`simulator`).
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from p2pllm.errors import RunError
from p2pllm_peers.lab.simulation.simulator import Progress, Setting, simulate


def simulate_apart(setting: Setting, progress: Progress = lambda text: None) -> dict[str, Any]:
    """Simulate one size in a process of its own, so that `memory_mb`, its largest resident memory, is this size's.

    Raises RunError if that process fails, as for lack of memory.
    """
    command = [sys.executable, "-m", "p2pllm_peers.lab.simulation.process", json.dumps(asdict(setting))]
    # Sets of text would be walked in another order in every process.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            for line in process.stdout:
                message = json.loads(line)
                if "result" in message:
                    return dict(message["result"])
                progress(message["progress"])
            process.wait()  # it ends by itself, and with its own code
        finally:
            process.kill()
    raise RunError(
        f"The simulation of {setting.peers:,} peers ended early with code {process.returncode}; "
        "try fewer --peers if this machine is short of memory."
    )


def main() -> None:
    """Run the setting that the command line gives as JSON."""
    fields = json.loads(sys.argv[1])
    setting = Setting(**{**fields, "delay_ms": tuple(fields["delay_ms"])})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C is for who started us; we end without a word
    logging.disable(logging.CRITICAL)  # peers that fail are part of what is simulated

    def say(**message: Any) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    result = simulate(setting, lambda text: say(progress=text))
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    say(result={**result, "memory_mb": round(peak, 1)})


if __name__ == "__main__":
    main()
