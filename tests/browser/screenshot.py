"""`make screenshot`: the README's picture, of a monitor that has really run for six minutes.

In its second minute billing is slow, in its third it is down for a quarter of a minute.
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
# What billing is made to do, and for how many seconds.
STORY = (
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
        place = Path(directory)
        (place / ".local").mkdir()
        shop = SQLiteShop(place / ".local" / "checkout.db")
        for statement in statements("sqlite"):
            shop.run(statement)
        add_sessions(shop, SESSIONS)
        env = {"APIKEY": "k", "STATUS_UPDATES": "true", "CHECK_INTERVAL_SECONDS": "5"}
        with running(place, env) as monitor:
            address = monitor.until(r"The monitor's page: (\S+)")[1]
            monitor.until("Checking")
            threading.Thread(target=listen, args=(monitor,), daemon=True).start()
            for mode, seconds in STORY:
                httpx.post(f"{address}simulate", content=mode)
                print(f"{mode}, {seconds} s", flush=True)  # noqa: T201
                time.sleep(seconds)
            picture(address)
    return 0


def listen(monitor: Monitor) -> None:
    """Take what it prints, so that it can go on printing."""
    with suppress(pytest.fail.Exception):
        monitor.until("no such line")


def picture(address: str) -> None:
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
