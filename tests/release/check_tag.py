"""`python -m tests.release.check_tag v1.2.3`: whether a tag may be released. Needs no library."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from apertus_mlx import __version__

ROOT = Path(__file__).parents[2]


def problems(tag: str, version: str, changelog: str, citation: str) -> list[str]:
    """Why `tag` is no release of `version`; none where it is one.

    Args:
        tag: as `v0.1.0`.
        version: the package's.
        changelog: text of CHANGELOG.md.
        citation: text of CITATION.cff.
    """
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, the version {version}")
    if not re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
    ):
        found.append(f"CHANGELOG.md has no section [{version}] with a date")
    if f"\nversion: {version}\n" not in citation:
        found.append(f"CITATION.cff is not of version {version}")
    return found


def main() -> None:
    """Say what is wrong with the tag, if anything is; exit code 1 then."""
    files = [(ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CITATION.cff")]
    found = problems(sys.argv[1], __version__, *files)
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
