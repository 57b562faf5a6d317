"""A peer's process: it prepares once, says so, and then answers each line with the seconds that one run took."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any


class Peer:
    """A script of ``benchmarks/peers``, run by the Python of the peer's own environment."""

    def __init__(self, python: Path, script: str, settings: dict[str, Any]) -> None:
        path = Path(__file__).parent / "peers" / script
        self.process = subprocess.Popen(
            [str(python), "-W", "ignore", str(path), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self.versions: dict[str, str] = json.loads(self._pipe(self.process.stdout).readline())

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def ask(self, what: str) -> Any:
        """Send a line, and read the answer as JSON."""
        stdin = self._pipe(self.process.stdin)
        stdin.write(f"{what}\n")
        stdin.flush()
        return json.loads(self._pipe(self.process.stdout).readline())

    def seconds(self, what: str) -> float:
        """How long one run takes."""
        return float(self.ask(what))

    def close(self) -> None:
        """End the process."""
        self._pipe(self.process.stdin).close()
        self.process.wait()
