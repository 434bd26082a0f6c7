"""A headless browser, where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BINARIES = ("chromium-headless-shell", "chromium", "google-chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium by its driver; skips the test where one of them or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium")
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for each in ("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(each)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()
