"""The page of `make run`: its buttons change billing, and the verdict follows."""

from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import capture
from tests.local.test_run import running

TIMEOUT_MS = 30_000  # milliseconds, enough for a tick or two and their display


def test_verdict_follows_the_simulated_billing_service(
    context: BrowserContext, tmp_path: Path
) -> None:
    env = {"APIKEY": "k", "STATUS_UPDATES": "true", "CHECK_BACKOFF_MAX_SECONDS": "0"}
    with running(tmp_path, env) as monitor:
        address = monitor.until(r"The monitor's page: (\S+)")[1]
        page = context.new_page()
        page.goto(address)
        verdict = page.locator("#text")
        # Of the sample sessions one resets its connection, and one has no checkout id.
        expect(verdict).to_contain_text("reached: 1 of 11 open sessions", timeout=TIMEOUT_MS)
        set_mode(page, "down")
        expect(verdict).to_contain_text("reached: 10 of 11 open sessions", timeout=TIMEOUT_MS)
        capture(page, "laptop-down")
        set_mode(page, "healthy")
        without_id = "The shop's data has sessions without a checkout id: 1 of 11 open sessions"
        expect(verdict).to_contain_text(without_id, timeout=TIMEOUT_MS)
        set_mode(page, "rate-limiting")
        expect(verdict).to_contain_text("Billing allows about", timeout=TIMEOUT_MS)
        page.get_by_role("button", name="Check all now").click()
        told = page.locator("#triggered")
        expect(told).to_contain_text("billing allows about", timeout=TIMEOUT_MS)
        capture(page, "laptop-rate-limiting")


def set_mode(page: Page, mode: str) -> None:
    page.get_by_role("button", name=mode).click()
    expect(page.get_by_role("button", name=mode)).to_have_attribute("aria-pressed", "true")
