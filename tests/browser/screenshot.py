"""`make screenshot`: take the README's picture of a monitor that has run for six minutes.

Billing is slow for a while in the second minute and down for 14 seconds in the third.
"""

import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import sync_playwright

from testkit.shops import SQLiteShop, add_sessions, statements
from tests.browser.conftest import ARGUMENTS, CHROMIUM
from tests.local.test_run import Monitor, running

PICTURE = Path(__file__).parents[2] / "docs" / "page.png"
# The modes of billing, each with its duration in seconds.
SCHEDULE = (
    ("by id", 70),
    ("slow", 16),
    ("by id", 60),
    ("down", 14),
    ("by id", 145),
)
SESSIONS = {
    **{f"cart-{n}": f"checkout_active_{n}" for n in range(1001, 1121)},
    "cart-1121": "checkout_500_1121",
    "cart-1122": "checkout_hang_1122",
    "cart-1123": "checkout_404_1123",
    **{f"cart-{n}": f"checkout_paid_{n - 1000}_{n}" for n in (1124, 1180, 1230, 1290, 1320)},
    "cart-1129": "checkout_failed_200_1129",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / ".local").mkdir()
        shop = SQLiteShop(path / ".local" / "checkout.db")
        for statement in statements("sqlite"):
            shop.run(statement)
        add_sessions(shop, SESSIONS)
        env = {"APIKEY": "k", "STATUS_UPDATES": "true", "CHECK_INTERVAL_SECONDS": "5"}
        with running(path, env) as monitor:
            address = monitor.until(r"The monitor's page: (\S+)")[1]
            monitor.until("Checking")
            threading.Thread(target=read_output, args=(monitor,), daemon=True).start()
            for mode, seconds in SCHEDULE:
                httpx.post(f"{address}simulate", content=mode)
                print(f"{mode}, {seconds} s", flush=True)  # noqa: T201
                time.sleep(seconds)
            take_picture(address)
    return 0


def read_output(monitor: Monitor) -> None:
    """Read the output, so that the monitor does not block on a full pipe."""
    with suppress(pytest.fail.Exception):
        monitor.until("no such line")


def take_picture(address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1000, "height": 830})
        page.goto(address)
        page.locator("#numbers .value").first.wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=PICTURE)
        print(f"{page.text_content('#text')}: {PICTURE}, {PICTURE.stat().st_size:,} bytes")  # noqa: T201
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
