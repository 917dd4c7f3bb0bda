"""The operator's page in a browser. Each test saves a screenshot in .screenshots."""

import random
from datetime import timedelta

import pytest
from playwright.sync_api import expect

from handlers.page import operators_page
from testkit.history import SECOND, History
from tests.browser.conftest import View

STATUS_UPDATES = {"STATUS_UPDATES": "true"}


WAITED = "open sessions have waited for up to"
A_FEW_WAIT = f"Billing answers with errors (500): 2 of 128 {WAITED} 27 min"
BILLING_DOWN = f"Billing cannot be reached: all 10 {WAITED} 2 min"
KEY_REFUSED = f"Billing refuses the key (401): all 20 {WAITED} 60 s"


def healthy(history: History, sessions: int = 128) -> None:
    """A shop where a few sessions fail, as usual, and billing was slow for a short time."""
    rng = random.Random(4)
    history.run("start", history.now - timedelta(hours=3))
    history.passes(
        720,
        row=lambda ago: {
            "checked": sessions - rng.randrange(max(1, sessions // 20)),
            "errors": rng.choice([0, 0, 1, 2]),
            "latency_p95_ms": 90 + rng.random() * 40 + (190 if 22 <= ago < 27 else 0),
        },
    )
    failed = min(2, sessions)
    history.counted(
        {"active": sessions - failed - 1, "not_found": 1, "unexpected_status": failed},
        {"10m": sessions // 3, "1h": sessions // 3, "24h": sessions - 2 * (sessions // 3)},
    )
    for n in range(failed):
        history.failing(
            f"cart-10{n}8",
            f"checkout_500_10{n}8",
            consecutive_failures=31 - 9 * n,
            failing_since=history.now - timedelta(minutes=27 - 5 * n),
            next_check_at=history.slot + (2 + n) * 10 * SECOND,
        )
    for n in range(4):
        history.change(
            f"cart-10{n}5",
            changed_at=history.now - (260 - 70 * n) * SECOND,
            new_status="failure" if n == 2 else "success",
            billing_status="declined" if n == 2 else "paid",
        )


def unreachable_billing(history: History) -> None:
    """Billing has not answered for two minutes."""
    history.passes(
        60,
        row=lambda ago: {
            "checked": 128 if ago > 24 else 40,
            "errors": 0 if ago > 24 else 40,
            "latency_p95_ms": 104.0 if ago > 24 else None,
        },
    )
    history.counted({"network_error": 10})
    for n in range(10):
        history.failing(
            f"cart-10{n}",
            f"checkout_{n}",
            last_outcome="network_error",
            last_status_code=None,
            consecutive_failures=6,
            failing_since=history.now - 122 * SECOND,
        )


def test_healthy_monitor(view: View) -> None:
    healthy(view.history)
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    expect(view.page).to_have_title(f"! {A_FEW_WAIT}")
    expect(view.page.get_by_role("table").get_by_text("cart-1008")).to_be_visible()
    view.capture("well")


@pytest.mark.deployed(env=STATUS_UPDATES)
@pytest.mark.browser_options(color_scheme="dark")
def test_healthy_monitor_in_dark_mode(view: View) -> None:
    healthy(view.history)
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    background = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(14, 19, 24)"
    view.capture("well-dark")


@pytest.mark.browser_options(
    viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True
)
def test_healthy_monitor_on_a_phone(view: View) -> None:
    healthy(view.history)
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    assert view.page.evaluate("document.documentElement.scrollWidth") == 360
    view.capture("well-phone")


def test_unreachable_billing(view: View) -> None:
    unreachable_billing(view.history)
    view.open()
    view.expect_verdict(BILLING_DOWN, "critical")
    assert view.page.locator("#plots .failed").count() == 25
    view.capture("billing-down")


@pytest.mark.browser_options(color_scheme="dark", viewport={"width": 360, "height": 740})
def test_unreachable_billing_on_a_phone_in_dark_mode(view: View) -> None:
    unreachable_billing(view.history)
    view.open()
    view.expect_verdict(BILLING_DOWN, "critical")
    view.capture("billing-down-phone-dark")


def test_paused_billing(view: View) -> None:
    history = view.history
    history.passes(60, row=lambda ago: {"checked": 0 if ago < 3 else 128, "latency_p95_ms": 98.0})
    history.counted({"active": 120, "rate_limited": 8})
    history.set_shared(paused_until=history.now + 28 * SECOND)
    view.open()
    view.expect_verdict("Billing asked for a pause until 12:00:30 UTC", "warning")
    view.capture("rate-limited")


def test_billing_refuses_the_key(view: View) -> None:
    history = view.history
    history.passes(60, row=lambda ago: {"checked": 20, "errors": 20 if ago < 8 else 0})
    history.counted({"unauthorized": 20})
    for n in range(20):
        history.failing(f"s{n}", "c", last_outcome="unauthorized", last_status_code=401)
    view.open()
    view.expect_verdict(KEY_REFUSED, "critical")
    view.capture("key-refused-by-billing")


def test_stopped_loop_leaves_gaps(view: View) -> None:
    history = view.history
    history.run("start", history.now - timedelta(hours=3))
    history.passes(720, missed=range(8))
    history.counted({"active": 128})
    view.open()
    view.expect_verdict("No pass for 42 s", "critical")
    assert view.page.locator("#plots .missed").count() == 7
    view.capture("stopped")


def test_missed_ticks_of_a_healthy_monitor(view: View) -> None:
    history = view.history
    history.run("start", history.now - timedelta(hours=3))
    history.passes(720, missed=(9, 10, 11, 31))
    history.counted({"active": 128})
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    note = "4 of 719 ticks of the last hour were missed, the last at 11:59:15 UTC."
    expect(view.page.locator("#notes")).to_have_text(note)
    assert view.page.locator("#plots .missed").count() == 4
    view.capture("missed-ticks")


def test_no_open_sessions(view: View) -> None:
    view.history.passes(60, row=lambda _: {"checked": 0, "latency_p95_ms": None})
    view.history.counted({})
    view.open()
    view.expect_verdict("No open sessions, and the monitor is running on time", "ok")
    view.capture("empty")


def test_first_seconds_of_a_new_monitor(view: View) -> None:
    view.history.run("start", view.history.now - 3 * SECOND)
    view.open()
    view.expect_verdict("Waiting for the first pass", "waiting")
    view.capture("installed")


def test_three_thousand_sessions(view: View) -> None:
    healthy(view.history, 3000)
    for worker in (1, 2):
        tick = view.history.slot
        view.history.run("tick", tick + worker * SECOND, tick=tick, checked=200, duration_ms=400)
    view.open()
    view.expect_verdict(A_FEW_WAIT.replace("128", "3,000"), "warning")
    view.capture("3000")


def test_ids_and_statuses_are_shown_as_text_not_html(view: View) -> None:
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    history = view.history
    history.passes(3)
    history.counted({"active": 1})
    history.failing(evil, f"{evil}-checkout")
    history.change(evil, billing_status=f"{evil}-status")
    view.open()
    expect(view.page.get_by_role("cell", name=evil, exact=True).first).to_be_visible()
    expect(view.page.get_by_text(f"{evil}-status")).to_be_visible()
    assert view.page.evaluate("window.hacked") is None
    view.capture("script-in-ids")


@pytest.mark.deployed(key="right-key")
@pytest.mark.console_errors  # a 403 counts as an error
def test_deployed_page_asks_for_the_key_and_keeps_it_for_the_tab(view: View) -> None:
    healthy(view.history)
    page = view.page
    view.open()
    expect(page.get_by_label("API key")).to_be_focused()
    view.expect_verdict("Enter the API key to see the monitor", "waiting")
    view.capture("key")
    page.keyboard.type("wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The API rejected this key.")
    view.capture("key-refused")
    page.get_by_label("API key").fill("right-key")
    page.get_by_role("button", name="Show the monitor").click()
    view.expect_verdict(A_FEW_WAIT, "warning")
    page.reload()
    view.expect_verdict(A_FEW_WAIT, "warning")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert "right-key" not in page.content()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()


def test_manual_trigger_shows_checked_and_skipped_sessions(view: View) -> None:
    healthy(view.history)
    view.open()
    view.page.get_by_role("button", name="Check all now").click()
    expect(view.page.locator("#triggered")).to_have_text(
        "12:00:02: Checked 8 of 9 open checkout sessions; skipped: 1 in_flight."
        " Found: 7 active, 1 unexpected status."
    )
    expect(view.page.get_by_role("button", name="Check all now")).to_be_enabled()
    view.capture("triggered")


@pytest.mark.console_errors
def test_lost_contact_is_shown_with_its_start_and_recovers(view: View) -> None:
    view.page.clock.install()
    healthy(view.history)
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    view.stage.is_up = False
    view.page.clock.run_for(6000)
    view.expect_verdict("Lost contact with the monitor since 12:00:02 UTC", "critical")
    view.page.wait_for_timeout(400)
    view.capture("lost-contact")
    view.stage.is_up = True
    view.page.clock.run_for(6000)
    view.expect_verdict(A_FEW_WAIT, "warning")


@pytest.mark.console_errors
def test_unreachable_database_is_shown_with_the_monitors_message(view: View) -> None:
    view.monitor.error = "The database db:3306/shop cannot be used: Can't connect (2003)."
    view.open()
    view.expect_verdict("The monitor cannot report its state", "critical")
    expect(view.page.locator("#notes")).to_have_text(view.monitor.error)
    view.capture("database-away")


def test_stage_url_without_trailing_slash_works(view: View) -> None:
    healthy(view.history)
    view.open("/live")
    view.expect_verdict(A_FEW_WAIT, "warning")
    assert f"{view.url}/live/api/status" in {r.url for r in view.requests}


def test_page_is_usable_by_keyboard(view: View) -> None:
    healthy(view.history)
    page = view.page
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Check all now")).to_be_focused()
    page.keyboard.press("Tab")
    plots = page.get_by_role("slider")
    expect(plots).to_be_focused()
    page.keyboard.press("ArrowLeft")
    reading = page.locator("#read")
    expect(reading).to_contain_text("11:59:55 – ")
    expect(reading).to_contain_text("95 % of answers within")
    assert plots.get_attribute("aria-valuetext") == reading.text_content()
    page.keyboard.press("Home")
    expect(reading).to_contain_text("11:55:05 – ")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("cell", name="11:59:55")).to_be_visible()
    view.capture("keyboard")


def test_page_polls_twelve_times_a_minute_but_not_while_hidden(view: View) -> None:
    view.page.clock.install()
    healthy(view.history)
    view.open()
    view.expect_verdict(A_FEW_WAIT, "warning")
    before = len(view.requests)
    for _ in range(12):
        with view.page.expect_response("**/api/status"):
            view.page.clock.run_for(5000)
    assert len(view.requests) - before == 12
    view.page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    view.page.clock.run_for(60_000)
    assert len(view.requests) - before == 12


def test_page_is_small_and_allows_only_its_own_script() -> None:
    page = operators_page()
    assert len(page.html.encode()) < 60_000
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http:" not in page.html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page.html
