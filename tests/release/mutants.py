"""`python -m tests.release.mutants STATS`: whether the tests notice enough of the faults of mutmut.

What survives is in part no fault (another text of an error, a bound that cannot be met), so the
share is compared with one that was reached, and a new gap in the tests is what lowers it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

# On 2026-11-27 86 of 100 faults in system/sizes.py and text/bounded_pattern.py were noticed.
LEAST_NOTICED = 80


def noticed(stats: Mapping[str, int]) -> float:
    """How many of 100 faults failed a test, did not end, or crashed.

    Args:
        stats: what `mutmut export-cicd-stats` writes.
    """
    found = sum(stats[kind] for kind in ("killed", "timeout", "segfault"))
    return 100 * found / stats["total"] if stats["total"] else 0.0


def main() -> None:
    """Print the share; exit code 1 if it is too small."""
    share = noticed(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    print(f"{share:.1f} of 100 faults noticed, at least {LEAST_NOTICED} expected")
    sys.exit(share < LEAST_NOTICED)


if __name__ == "__main__":
    main()
