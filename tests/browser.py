"""A browser without a window, for the pages that fastattn makes: what they show, say and fetch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 60  # for a page to get somewhere; a busy machine is slow
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--window-size=1300,1000",
    "--force-device-scale-factor=1",
)  # fmt: skip


class Browser:
    """Chromium. A page is opened from disk, and what it logged and fetched is known from then on."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._console: list[dict[str, Any]] = []
        self._fetched: list[str] = []

    def open(self, page: Path) -> None:
        """Show `page`, a file, once it and its scripts are loaded."""
        self._read_logs()
        self._console, self._fetched = [], []
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns: `script` is the body of a function of `arguments`."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns, as soon as that is anything but false, 0, null or empty."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_S, 0.1).until(lambda _: self.run(script, *arguments), script)

    def choose(self, menu: str, text: str) -> None:
        """Take the option `text` of the `<select>` with this id."""
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element(By.ID, menu)).select_by_visible_text(text)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window, in CSS pixels."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        builder = ActionBuilder(self.driver)
        builder.pointer_action.move_to_location(int(x), int(y))
        builder.perform()
        ActionChains(self.driver).move_by_offset(1, 1).perform()

    def complaints(self) -> list[str]:
        """Warnings and errors on the console since the page was opened."""
        self._read_logs()
        return [entry["message"] for entry in self._console if entry["level"] in ("WARNING", "SEVERE")]

    def fetched(self) -> list[str]:
        """Addresses that the page asked for besides itself and what it carries."""
        self._read_logs()
        own = self.driver.current_url
        carried = ("data:", "blob:", "about:", "chrome:", "chrome-untrusted:")  # the last two: its first tab
        return [address for address in self._fetched if address != own and not address.startswith(carried)]

    def _read_logs(self) -> None:
        self._console += self.driver.get_log("browser")
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._fetched.append(message["params"]["request"]["url"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser; a test that asks for one where there is none is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    program = next((found for found in map(shutil.which, _NAMES) if found), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="fastattn-browser-", ignore_cleanup_errors=True) as profile:
        # In a container root has no sandbox to be had.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        for flag in (*_FLAGS, *sandbox, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            browser.set_page_load_timeout(2 * WAIT_S)
            yield Browser(browser)
        finally:
            browser.quit()
