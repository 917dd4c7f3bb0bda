"""The page of `make run`: a newcomer makes billing misbehave and watches the monitor react."""

from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import keep
from tests.local.test_run import running

SOON = 30_000  # milliseconds in which a tick or two, and a look at them, are sure to come


def test_what_billing_is_made_to_do_is_told_by_the_verdict(
    context: BrowserContext, tmp_path: Path
) -> None:
    env = {"APIKEY": "k", "STATUS_UPDATES": "true", "CHECK_BACKOFF_MAX_SECONDS": "0"}
    with running(tmp_path, env) as monitor:
        address = monitor.until(r"The monitor's page: (\S+)")[1]
        page = context.new_page()
        page.goto(address)
        verdict = page.locator("#text")
        expect(verdict).to_have_text("All 11 open sessions checked on time", timeout=SOON)
        make(page, "down")
        expect(verdict).to_contain_text("Billing cannot be reached since", timeout=SOON)
        keep(page, "laptop-down")
        make(page, "healthy")
        expect(verdict).to_have_text("All 11 open sessions checked on time", timeout=SOON)
        make(page, "rate-limiting")
        expect(verdict).to_contain_text("Billing asked for a pause until", timeout=SOON)
        page.get_by_role("button", name="Check all now").click()
        expect(page.locator("#triggered")).to_contain_text("billing asked for a pause until")
        keep(page, "laptop-rate-limiting")


def make(page: Page, mode: str) -> None:
    page.get_by_role("button", name=mode).click()
    expect(page.get_by_role("button", name=mode)).to_have_attribute("aria-pressed", "true")
