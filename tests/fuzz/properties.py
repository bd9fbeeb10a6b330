"""What Hypothesis tries, by the run's own seed and longer than in CI: in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from fuzz.http_run import say
from fuzz.requests_run import Tally
from fuzz.sizes import PROFILE

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
PARTS = (  # side by side; what is timed together takes about as long
    ("test_job_machine.py", "test_formats.py"),
    ("test_raw_door.py", "test_lies.py"),
)
MOST_S = 900.0


def run_properties(seed: int, tally: Tally) -> None:
    """Run the parts; one that fails, or takes too long, is a failure of the run."""
    begun = time.monotonic()
    running = [_start(files, seed) for files in PARTS]
    try:
        for files, process in zip(PARTS, running, strict=True):
            names = ", ".join(files)
            try:
                output, _ = process.communicate(timeout=begun + MOST_S - time.monotonic())
            except subprocess.TimeoutExpired:
                tally.failures.append(f"{names}: not done within {MOST_S:.0f} s")
                continue
            if process.returncode:
                tally.failures.append(f"{names}, seed {seed}:\n{output[-6000:]}")
            say(f"{names}: {output.strip().splitlines()[-1] if output.strip() else 'nothing'}")
    finally:
        for process in running:
            process.kill()
            process.wait()


def _start(files: tuple[str, ...], seed: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-k", "not noticed", "-p", "no:cacheprovider"),
        *(f"--hypothesis-profile={PROFILE}", f"--hypothesis-seed={seed}"),
        *(str(_HERE / file) for file in files),
    ]
    return subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
