"""What a run has measured so far, kept until it has ended: the same command goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess

from benchmarks.pages import ROOT

CODE = ("mohawk", "kernels", "models", "benchmarks/*.py", "benchmarks/kernels")  # what a measurement is of


def signature(*given: object) -> str:
    """Of what is asked for, and of the code as it is."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout

    text = json.dumps(given, default=str) + git("rev-parse", "HEAD") + git("diff", "HEAD", "--", *CODE)
    return hashlib.sha256(text.encode()).hexdigest()


class Unfinished:
    """Measurements by case and round, a line each. What is of another signature, and a line that a kill cut, are not
    read."""

    def __init__(self, path: pathlib.Path | None, signed: str):
        self.path, self.signed = path, signed
        self.found: dict[tuple[str, int], dict] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                kept = json.loads(line)
            except ValueError:
                continue
            if kept["signature"] == signed:
                self.found[kept["case"], kept["round"]] = kept["result"]
        if not self.found:
            path.unlink()

    def keep(self, case: str, number: int, result: dict) -> None:
        if self.path is not None and "skipped" not in result:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                kept = {"signature": self.signed, "case": case, "round": number, "result": result}
                file.write(json.dumps(kept) + "\n")

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
