"""The operator's page, in a browser. Each state leaves a screenshot in .screenshots."""

import random
from datetime import timedelta

import pytest
from playwright.sync_api import expect

from handlers.page import operators_page
from tests.browser.conftest import Seen
from tests.history import SECOND, History

STATUS_UPDATES = {"STATUS_UPDATES": "true"}


def well(history: History, sessions: int = 128) -> None:
    """A shop in which a few sessions fail, as always, and billing was slow for a moment."""
    draw = random.Random(4)
    history.run("start", history.now - timedelta(hours=3))
    history.passes(
        720,
        row=lambda ago: {
            "checked": sessions - draw.randrange(max(1, sessions // 20)),
            "errors": draw.choice([0, 0, 1, 2]),
            "latency_p95_ms": 90 + draw.random() * 40 + (190 if 22 <= ago < 27 else 0),
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


def billing_away(history: History) -> None:
    """Nobody answers at billing for two minutes."""
    history.passes(
        60,
        row=lambda ago: {
            "checked": 128 if ago > 24 else 40,
            "errors": 0 if ago > 24 else 40,
            "latency_p95_ms": 104.0 if ago > 24 else None,
        },
    )
    history.counted({"network_error": 128})
    for n in range(10):
        history.failing(
            f"cart-10{n}",
            f"checkout_{n}",
            last_outcome="network_error",
            last_status_code=None,
            consecutive_failures=6,
            failing_since=history.now - 122 * SECOND,
        )


def test_a_monitor_at_work(seen: Seen) -> None:
    well(seen.history)
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    expect(seen.page).to_have_title("✓ All 128 open sessions checked on time")
    expect(seen.page.get_by_role("table").get_by_text("cart-1008")).to_be_visible()
    seen.keep("well")


@pytest.mark.deployed(env=STATUS_UPDATES)
@pytest.mark.looks(color_scheme="dark")
def test_a_monitor_at_work_in_the_dark(seen: Seen) -> None:
    well(seen.history)
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(14, 19, 24)"
    seen.keep("well-dark")


@pytest.mark.looks(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
def test_a_monitor_at_work_on_a_phone(seen: Seen) -> None:
    well(seen.history)
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    seen.keep("well-phone")


def test_billing_that_cannot_be_reached(seen: Seen) -> None:
    billing_away(seen.history)
    seen.open()
    seen.verdict("Billing cannot be reached since 11:58 UTC", "critical")
    assert seen.page.locator("#plots .failed").count() == 25
    seen.keep("billing-down")


@pytest.mark.looks(color_scheme="dark", viewport={"width": 360, "height": 740})
def test_billing_that_cannot_be_reached_on_a_phone_in_the_dark(seen: Seen) -> None:
    billing_away(seen.history)
    seen.open()
    seen.verdict("Billing cannot be reached since 11:58 UTC", "critical")
    seen.keep("billing-down-phone-dark")


def test_billing_that_asks_for_a_pause(seen: Seen) -> None:
    history = seen.history
    history.passes(60, row=lambda ago: {"checked": 0 if ago < 3 else 128, "latency_p95_ms": 98.0})
    history.counted({"active": 120, "rate_limited": 8})
    history.set_shared(paused_until=history.now + 28 * SECOND)
    seen.open()
    seen.verdict("Billing asked for a pause until 12:00:30 UTC", "warning")
    seen.keep("rate-limited")


def test_billing_that_refuses_the_key(seen: Seen) -> None:
    history = seen.history
    history.passes(60, row=lambda ago: {"checked": 20, "errors": 20 if ago < 8 else 0})
    history.counted({"unauthorized": 20})
    history.failing("s", "c", last_outcome="unauthorized", last_status_code=401)
    seen.open()
    seen.verdict("Billing refuses the key since 11:59 UTC (401)", "critical")
    seen.keep("key-refused-by-billing")


def test_a_stopped_loop_leaves_gaps(seen: Seen) -> None:
    history = seen.history
    history.run("start", history.now - timedelta(hours=3))
    history.passes(720, missed=range(8))
    history.counted({"active": 128})
    seen.open()
    seen.verdict("No pass for 42 s", "critical")
    assert seen.page.locator("#plots .missed").count() == 7
    seen.keep("stopped")


def test_ticks_that_were_missed_while_all_else_is_well(seen: Seen) -> None:
    history = seen.history
    history.run("start", history.now - timedelta(hours=3))
    history.passes(720, missed=(9, 10, 11, 31))
    history.counted({"active": 128})
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    note = "4 of 719 ticks of the last hour were missed, the last at 11:59:15 UTC."
    expect(seen.page.locator("#notes")).to_have_text(note)
    assert seen.page.locator("#plots .missed").count() == 4
    seen.keep("missed-ticks")


def test_a_shop_without_open_sessions(seen: Seen) -> None:
    seen.history.passes(60, row=lambda _: {"checked": 0, "latency_p95_ms": None})
    seen.history.counted({})
    seen.open()
    seen.verdict("No open sessions, and the monitor is running on time", "ok")
    seen.keep("empty")


def test_a_monitor_that_has_just_been_installed(seen: Seen) -> None:
    seen.history.run("start", seen.history.now - 3 * SECOND)
    seen.open()
    seen.verdict("Waiting for the first pass", "waiting")
    seen.keep("installed")


def test_three_thousand_sessions(seen: Seen) -> None:
    well(seen.history, 3000)
    for worker in (1, 2):
        tick = seen.history.slot
        seen.history.run("tick", tick + worker * SECOND, tick=tick, checked=200, duration_ms=400)
    seen.open()
    seen.verdict("All 3,000 open sessions checked on time", "ok")
    seen.keep("3000")


def test_what_others_write_is_shown_as_they_wrote_it(seen: Seen) -> None:
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    history = seen.history
    history.passes(3)
    history.counted({"active": 1})
    history.failing(evil, f"{evil}-checkout")
    history.change(evil, billing_status=f"{evil}-status")
    seen.open()
    expect(seen.page.get_by_role("cell", name=evil, exact=True).first).to_be_visible()
    expect(seen.page.get_by_text(f"{evil}-status")).to_be_visible()
    assert seen.page.evaluate("window.hacked") is None
    seen.keep("script-in-ids")


@pytest.mark.deployed(key="right-key")
@pytest.mark.complaints  # a browser's console counts a 403 as an error
def test_a_deployed_page_asks_for_the_key_and_keeps_it_for_the_tab(seen: Seen) -> None:
    well(seen.history)
    page = seen.page
    seen.open()
    expect(page.get_by_label("API key")).to_be_focused()
    seen.verdict("Enter the API key to see the monitor", "waiting")
    seen.keep("key")
    page.keyboard.type("wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The API rejected this key.")
    seen.keep("key-refused")
    page.get_by_label("API key").fill("right-key")
    page.get_by_role("button", name="Show the monitor").click()
    seen.verdict("All 128 open sessions checked on time", "ok")
    page.reload()
    seen.verdict("All 128 open sessions checked on time", "ok")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert "right-key" not in page.content()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()


def test_a_check_on_demand_tells_what_it_did_and_skipped(seen: Seen) -> None:
    well(seen.history)
    seen.open()
    seen.page.get_by_role("button", name="Check all now").click()
    expect(seen.page.locator("#triggered")).to_have_text(
        "12:00:02: Checked 8 of 9 open checkout sessions; skipped: 1 in_flight."
        " Found: 7 active, 1 unexpected status."
    )
    expect(seen.page.get_by_role("button", name="Check all now")).to_be_enabled()
    seen.keep("triggered")


@pytest.mark.complaints
def test_contact_that_is_lost_is_told_with_since_when_and_comes_back(seen: Seen) -> None:
    seen.page.clock.install()
    well(seen.history)
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    seen.stage.is_up = False
    seen.page.clock.run_for(6000)
    seen.verdict("Lost contact with the monitor since 12:00:02 UTC", "critical")
    seen.page.wait_for_timeout(400)
    seen.keep("lost-contact")
    seen.stage.is_up = True
    seen.page.clock.run_for(6000)
    seen.verdict("All 128 open sessions checked on time", "ok")


@pytest.mark.complaints
def test_a_database_that_is_away_is_told_in_the_monitors_words(seen: Seen) -> None:
    seen.monitor.error = "The database db:3306/shop cannot be used: Can't connect (2003)."
    seen.open()
    seen.verdict("The monitor cannot report its state", "critical")
    expect(seen.page.locator("#notes")).to_have_text(seen.monitor.error)
    seen.keep("database-away")


def test_a_stage_without_a_slash_behind_it_will_do(seen: Seen) -> None:
    well(seen.history)
    seen.open("/live")
    seen.verdict("All 128 open sessions checked on time", "ok")
    assert f"{seen.url}/live/api/status" in {r.url for r in seen.requests}


def test_all_of_it_can_be_reached_and_read_by_keyboard(seen: Seen) -> None:
    well(seen.history)
    page = seen.page
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Check all now")).to_be_focused()
    page.keyboard.press("Tab")
    plots = page.get_by_role("slider")
    expect(plots).to_be_focused()
    page.keyboard.press("ArrowLeft")
    told = page.locator("#read")
    expect(told).to_contain_text("11:59:55 – ")
    expect(told).to_contain_text("95 % of answers within")
    assert plots.get_attribute("aria-valuetext") == told.text_content()
    page.keyboard.press("Home")
    expect(told).to_contain_text("11:55:05 – ")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("cell", name="11:59:55")).to_be_visible()
    seen.keep("keyboard")


def test_it_asks_twelve_times_a_minute_and_not_at_all_when_nobody_looks(seen: Seen) -> None:
    seen.page.clock.install()
    well(seen.history)
    seen.open()
    seen.verdict("All 128 open sessions checked on time", "ok")
    before = len(seen.requests)
    for _ in range(12):
        with seen.page.expect_response("**/api/status"):
            seen.page.clock.run_for(5000)
    assert len(seen.requests) - before == 12
    seen.page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    seen.page.clock.run_for(60_000)
    assert len(seen.requests) - before == 12


def test_it_is_small_and_nothing_in_it_runs_but_its_own_script() -> None:
    page = operators_page()
    assert len(page.html.encode()) < 60_000
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http:" not in page.html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page.html
