"""Run the tests of the kernels and of whole models on a GPU and keep what they said, with machine, versions and date.

python benchmarks/gpu_tests.py --out benchmarks/results/gpu_tests.json --processes 8

A file of the same machine, versions and day keeps what it says of tests that are not run this time; another is refused.
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# what runs on the GPU where there is one
PATHS = ["tests/gpu", "tests/ops/triton", "tests/engine/test_graphs.py", "tests/engine/test_draft_graphs.py"]


class Recorder:
    """Collects outcome and seconds of every test in a file that is whole after each of them, and prints what failed."""

    def __init__(self, out: Path, machine: dict[str, str | None]) -> None:
        self.out, self.machine = out, machine
        self.tests: dict[str, dict[str, object]] = {}
        if out.exists():
            earlier = json.loads(out.read_text())
            if earlier["machine"] != machine:
                sys.exit(f"error: {out} is of {earlier['machine']}, this is {machine}; name another file")
            self.tests = {row["test"]: row for row in earlier["tests"]}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row a test: its call, or the skip or error that kept it from one."""
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.tests[report.nodeid] = row
            self.write()
        if report.failed:
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)

    def write(self) -> None:
        """Replace the file."""
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps({"machine": self.machine, "tests": list(self.tests.values())}, indent=1) + "\n")
        part.replace(self.out)


def main() -> None:
    """Run, print what pytest prints, write the file; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--processes", type=int, default=1, help="tests at a time: kernels are compiled on the CPU")
    parser.add_argument("paths", nargs="*", default=PATHS, help=f"what to collect (default: {' '.join(PATHS)})")
    options = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers", "tokenizers", "pydantic")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    # the processes share the cores: a twin on the CPU takes one of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spread = ["-n", str(options.processes), "--dist", "worksteal"] if options.processes > 1 else []
    code = pytest.main([*spread, "--tb=short", *options.paths], plugins=[Recorder(options.out, machine)])
    sys.exit(int(code))


if __name__ == "__main__":
    main()
