"""`himo train` under torchrun, for tests that kill or wait for its processes."""

import subprocess
import time
from pathlib import Path

from launch import ROOT, environment, torchrun


class TrainProcesses:
    """`himo train` as several processes; `end` waits for all of them."""

    def __init__(
        self, world: int, logs: Path, arguments: list[str], launch: tuple[str, ...] = ()
    ) -> None:
        self.logs = logs
        # `--`, because torchrun would parse --logs as its own --logs-specs.
        command = torchrun(world, *launch, "-m", "--", "himo", *arguments)
        self.output = open(logs.parent / f"{logs.name}.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def end(self, status: int | None = 0, timeout_s: float = 240) -> str:
        returned = self.process.wait(timeout=timeout_s)
        self.output.seek(0)
        output = self.output.read()
        self.output.close()
        assert (returned == status) if status is not None else returned, output
        return output

    def wait_for(self, pattern: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not list(self.logs.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.end()
            time.sleep(0.02)

    def process_of(self, rank: int) -> int:
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except (OSError, IndexError):
                continue
            if f"RANK={rank}".encode() in variables and int(parent) == self.process.pid:
                return int(entry.name)
        raise AssertionError(f"no process of rank {rank}")
