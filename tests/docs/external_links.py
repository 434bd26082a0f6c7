"""`python -m tests.docs.external_links`: asks the hosts that README and docs link to, at night.

A page that is gone, or a host that is not there, is broken. One that refuses a program, or is busy,
is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from tests.docs.markdown import PAGES, links

GONE = (404, 410)
OWN_MACHINE = ("http://127.0.0.1", "http://localhost")


def addresses() -> set[str]:
    """What the pages link to elsewhere, without the place in the page."""
    found = {link.partition("#")[0] for page in PAGES for link in links(page)}
    return {each for each in found if each.startswith("http") and not each.startswith(OWN_MACHINE)}


def broken(found: Iterable[str], status: Callable[[str], int | str]) -> list[str]:
    """Which addresses are broken, and how; `status` is the code of the answer, or why none came."""
    answers = {address: status(address) for address in sorted(found)}
    return [f"{a}: {s}" for a, s in answers.items() if s in GONE or isinstance(s, str)]


def main() -> None:
    """Print what is broken; exit code 1 if something is."""
    import httpx

    def status(address: str) -> int | str:
        try:
            with client.stream("GET", address) as answer:
                return answer.status_code
        except httpx.TransportError as error:
            return type(error).__name__

    transport = httpx.HTTPTransport(retries=3)
    with httpx.Client(follow_redirects=True, timeout=30, transport=transport) as client:
        found = broken(addresses(), status)
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
