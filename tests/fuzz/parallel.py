"""The corruption cases over several processes; one that dies of a case names it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.corruption import Subjects, Undetected


@dataclass
class Corruptions:
    """How many cases there were, and those that went by unnoticed."""

    cases: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    undetected: list[str] = field(default_factory=list)


def run_share(seed: int, first: int, last: int, step: int) -> None:
    """One process's cases: a line of JSON before each, and one after it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        subjects = Subjects(folder)
        for number in range(first, last, step):
            print(json.dumps([number]), flush=True)
            try:
                print(json.dumps([number, subjects.run(str(seed), number)[0], ""]))
            except Undetected as fault:
                print(json.dumps([number, "undetected", str(fault)]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_corruptions(seed: int, cases: int, processes: int) -> Corruptions:
    """All cases; what kills a process counts as undetected, and the others go on."""
    result = Corruptions()
    children = []
    for place in range(processes):
        arguments = [str(n) for n in (seed, place, cases, processes)]
        command = [sys.executable, "-m", "fuzz", "share", *arguments]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for place, child in enumerate(children):
        begun = -1
        assert child.stdout is not None
        for line in child.stdout:
            number, *told = json.loads(line)
            begun = number
            if told:
                begun = -1
                _note(result, number, *told)
        code = child.wait()
        if code != 0 or begun >= 0:
            _note(result, begun, "undetected", f"process {place} ended with {code}")
    return result


def _note(result: Corruptions, number: int, verdict: str, fault: str) -> None:
    result.cases += 1
    result.verdicts[verdict] += 1
    if verdict == "undetected":
        result.undetected.append(f"case {number}: {fault}")
