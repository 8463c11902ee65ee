"""Names, at the end of a test run, the reference numbers that the book does not compute yet."""

import re


def pytest_terminal_summary(terminalreporter):
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    missing = sorted(name for reason in reasons for name in re.findall(r"no adapter yet for (\S+):", reason))
    if missing:
        terminalreporter.write_line(f"golden: {len(missing)} cases without adapter: {', '.join(missing)}")
