"""At the end of a run, what holds for which model: a table of checks and models."""

from __future__ import annotations

import re

import pytest

MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}
RANK = ["–", "✓", "✗"]  # of several cases the worst counts
TABLE: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = re.search(r"test_contract\w*\.py::test_(\w+)\[.*?<([^>]+)>", report.nodeid)
    if found is None or (report.when != "call" and report.outcome == "passed"):
        return
    check, name = found[1].replace("_", " "), found[2]
    row = TABLE.setdefault(check, {})
    row[name] = max(row.get(name, "–"), MARKS[report.outcome], key=RANK.index)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    names = sorted({name for row in TABLE.values() for name in row})
    width = max(len(check) for check in TABLE)
    terminalreporter.section("what every model promises")
    terminalreporter.write_line(" " * width + "".join(f"  {name}" for name in names))
    for check, row in TABLE.items():
        marks = "".join("  " + row.get(name, " ").center(len(name)) for name in names)
        terminalreporter.write_line(check.ljust(width) + marks)
    TABLE.clear()
