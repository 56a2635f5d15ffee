"""What every comparison needs outside of its sides: worker processes, the machine, and TRL's environment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "bench-trl"
TRL = "trl==0.23.1"
KEEP_FREED = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "500000000"
}  # fmt: skip
"""What glibc reads when a process starts."""

Answer = dict[str, Any]


class WorkerError(Exception):
    """A side ended before it answered."""


class Worker:
    """One side in its own process: a JSON line in, a JSON line out."""

    def __init__(
        self, name: str, python: str, command: Sequence[str], threads: int, folder: Path = ENVIRONMENT, *,
        keep_freed: bool = False,
    ) -> None:  # fmt: skip
        """``command`` is what follows ``python -m``; what the process says lies in ``NAME.log`` in the folder.

        ``keep_freed`` lets the C library keep what is freed, in place of giving it back and asking for it anew.

        Threads that wait for others sleep: where they spin, they take the processor from those that they wait for as
        soon as there is other work on the machine.
        """
        quiet = {
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        } | (KEEP_FREED if keep_freed else {})  # fmt: skip
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", *command], cwd=ROOT, env=os.environ | quiet, text=True, bufsize=1, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.ready = self._answer()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"side {self.name} ended early; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
        answer: Answer = json.loads(line)
        return answer

    def ask(self, request: Mapping[str, object]) -> Answer:
        """The answer to one request. Raises WorkerError where the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def prepare_environment(folder: Path = ENVIRONMENT, trl: str = TRL) -> Path:
    """The interpreter of an environment with that TRL; everything else comes from this interpreter's own packages."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not list(packages.glob(f"{trl.replace('==', '-')}.dist-info")):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "--no-deps", trl], check=True)
    return python


def machine(threads: int) -> dict[str, object]:
    """What the run ran on, without names of machine or user."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }
