"""The operator's page in a browser. Each test saves a screenshot in .screenshots."""

import random
from datetime import timedelta

import pytest
from playwright.sync_api import expect

from core.domain.model import iso
from handlers.page import operators_page
from testkit.history import SECOND, History
from tests.browser.conftest import DASHBOARD, View

STATUS_UPDATES = {"STATUS_UPDATES": "true"}


BILLING_DOWN = "Billing cannot be reached: all 10 open sessions have waited for up to 2 min"
KEY_REFUSED = "Billing refuses the key (401): all 20 open sessions have waited for up to 60 s"


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
            failing_since=history.now - (2 - n) * SECOND,  # it does not wait yet
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
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    expect(view.page).to_have_title("✓ All 128 open sessions checked on time")
    expect(view.page.locator("#failing").get_by_text("cart-1008")).to_be_visible()
    view.capture("well")


@pytest.mark.deployed(env=STATUS_UPDATES)
@pytest.mark.browser_options(color_scheme="dark")
def test_healthy_monitor_in_dark_mode(view: View) -> None:
    healthy(view.history)
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    background = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(14, 19, 24)"
    view.capture("well-dark")


@pytest.mark.browser_options(
    viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True
)
def test_healthy_monitor_on_a_phone(view: View) -> None:
    healthy(view.history)
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    assert view.page.evaluate("document.documentElement.scrollWidth") == 360
    view.capture("well-phone")


def test_unreachable_billing(view: View) -> None:
    unreachable_billing(view.history)
    view.open()
    view.expect_verdict(BILLING_DOWN, "critical")
    assert view.page.locator("#plots .failed").count() == 25
    step = view.page.locator("#next")
    expect(step).to_have_text(
        "See whether billing is up and can be reached from here. SessionsWaiting"
    )
    with view.page.context.expect_page() as opened:
        step.get_by_role("link").click()
    expect(opened.value.get_by_text("### SessionsWaiting")).to_be_visible()
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
    view.expect_verdict("All 3,000 open sessions checked on time", "ok")
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
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    page.reload()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
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
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    view.stage.is_up = False
    view.page.clock.run_for(6000)
    view.expect_verdict("Lost contact with the monitor since 12:00:02 UTC", "critical")
    view.page.wait_for_timeout(400)
    view.capture("lost-contact")
    view.stage.is_up = True
    view.page.clock.run_for(6000)
    view.expect_verdict("All 128 open sessions checked on time", "ok")


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
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    assert f"{view.url}/live/api/status" in {r.url for r in view.requests}


def test_page_is_usable_by_keyboard(view: View) -> None:
    healthy(view.history)
    page = view.page
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    page.get_by_role("button", name="Check all now").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("Tab")
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


@pytest.mark.browser_options(permissions=["clipboard-read", "clipboard-write"])
def test_first_waiting_sessions_are_in_the_verdict_and_can_be_copied(view: View) -> None:
    unreachable_billing(view.history)
    since = iso(view.history.now - timedelta(minutes=5))
    waiting = {"session_id": "cart-100", "since": since, "seconds": 300, "cause": "timeout"}
    other = {**waiting, "session_id": "cart-101", "cause": "unexpected_status", "status_code": 500}
    view.monitor.waiting = {
        "sessions": 2,
        "longest_seconds": 300,
        "causes": {"timeout": 1, "unexpected_status": 1},
        "first": [{**waiting, "status_code": None}, other],
    }
    view.open()
    rows = view.page.locator("#waiting tbody tr")
    expect(rows).to_have_text(["cart-1005 mintimeout", "cart-1015 minunexpected status (500)"])
    view.page.get_by_role("button", name="Copy this list").click()
    expect(view.page.locator("#copy")).to_have_text("Copied")
    assert view.page.evaluate("navigator.clipboard.readText()") == (
        f"cart-100 since {since}: timeout\ncart-101 since {since}: unexpected status"
    )
    view.capture("waiting")
    rows.get_by_role("link", name="cart-100").click()
    expect(view.page.locator("#found .facts")).to_contain_text("network error")


def test_one_session_is_found_and_checked(view: View) -> None:
    healthy(view.history)
    view.history.session("cart-7", "checkout_7")
    page = view.page
    page.clock.install()
    view.open()
    page.get_by_role("searchbox").fill("checkout_500_1008")
    page.keyboard.press("Enter")
    found = page.locator("#found")
    expect(found.locator("#found-title")).to_be_focused()
    expect(found.locator("dd")).to_have_text(
        [
            "cart-1008",
            "checkout_500_1008",
            "open, seen for 10 min",
            "unexpected status (500), 1 s ago",
            "for 2 s, 31 in a row",
            "in 18 s",
        ]
    )
    view.capture("session")
    with page.expect_request(lambda request: request.method == "POST") as posted:
        found.get_by_role("button", name="Check this one now").click()
    assert posted.value.post_data_json == {"session_ids": ["cart-1008"]}
    expect(found.locator("#found-text")).to_contain_text("Checked 8 of 9 open")
    expect(found.get_by_role("button", name="Check this one now")).to_be_focused()
    view.history.shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 'cart-1008'")
    page.clock.run_for(5000)
    expect(found.locator("dd").nth(2)).to_have_text("success, seen for 10 min")
    expect(found.locator("#found-text")).to_contain_text("Checked 8 of 9 open")
    page.get_by_role("searchbox").fill("nobody+&%")
    page.get_by_role("button", name="Find").click()
    expect(found).to_contain_text("No session has this id or checkout.")
    expect(found).to_contain_text("searched among the newest 5,000 sessions only")
    expect(found.locator("#found-title")).to_have_text("Session or checkout nobody+&%")
    found.get_by_role("link", name="Close").click()
    expect(found).to_be_hidden()
    page.goto(f"{view.url}/live/#session=cart-7")
    expect(found.locator("dd").first).to_have_text("cart-7")


def test_thirty_thousand_failing_sessions_are_paged(view: View) -> None:
    history = view.history
    unreachable_billing(history)
    history.shop.run(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
        " INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " SELECT printf('f-%05d', i), 'c-' || i, 'open' FROM n"
    )
    history.shop.run(
        "INSERT INTO checkout_session_check (session_id, first_seen_at, last_outcome,"
        " consecutive_failures, failing_since, next_check_at)"
        " SELECT id, %s, 'timeout', 7, %s, %s FROM checkout_session WHERE substr(id, 1, 2) = 'f-'",
        [history.now - timedelta(hours=1), history.now - timedelta(minutes=9), history.now],
    )
    history.counted({"network_error": 10, "timeout": 30_000})
    view.open()
    page = view.page
    page.locator("#outcomes").get_by_role("link", name="30,000").click()
    rows = page.locator("#found tbody tr")
    expect(rows).to_have_count(50)
    expect(rows.first).to_have_text("f-00001c-1timeout9 minnow")
    page.get_by_role("button", name="More").click()
    expect(rows).to_have_count(100)
    expect(page.locator("#found-text")).to_have_text("100 so far.")
    view.capture("outcome")
    page.locator("#outcomes").get_by_role("link", name="10", exact=True).click()
    expect(page.locator("#found-text")).to_have_text("10 in all.")


def test_selection_and_focus_survive_a_poll(view: View) -> None:
    page = view.page
    page.clock.install()
    healthy(view.history)
    view.open()
    row = page.locator("#failing tbody tr").first
    expect(row).to_contain_text("cart-1008")
    page.get_by_text("As a table").click()
    row.get_by_role("link").focus()
    page.evaluate(
        "getSelection().selectAllChildren(document.querySelector('#failing td:nth-child(2)'))"
    )
    view.history.now += 5 * SECOND
    view.history.passes(1, row=lambda _: {"checked": 77})
    view.history.failing("cart-0", "first", consecutive_failures=99)
    with page.expect_response("**/api/status"):
        page.clock.run_for(5000)
    expect(page.locator("#failing tbody tr")).to_have_count(3)
    expect(page.locator("#passes tbody tr").first).to_contain_text("77")
    link = page.locator("#failing").get_by_role("link", name="cart-1008")
    expect(link).to_be_focused()
    assert page.evaluate("getSelection().toString()") == "checkout_500_1008"
    expect(page.locator("#passes")).to_be_visible()


def test_hidden_tab_is_grey_and_says_when_it_was_right(view: View) -> None:
    view.history.passes(60)
    view.history.counted({"active": 128})
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    expect(view.page.get_by_role("link", name="Dashboard")).to_have_attribute("href", DASHBOARD)
    hide(view, hidden=True)
    expect(view.page).to_have_title("as of 12:00 All 128 open sessions checked on time")
    expect(view.page.locator("#verdict")).to_have_class("panel ok stale")
    expect(view.page.locator("#updated")).to_have_text("As of 12:00:02 UTC")
    view.capture("hidden")
    hide(view, hidden=False)
    expect(view.page).to_have_title("✓ All 128 open sessions checked on time")
    view.expect_verdict("All 128 open sessions checked on time", "ok")


@pytest.mark.console_errors
def test_the_true_sentence_of_a_late_answer_is_shown(view: View) -> None:
    page = view.page
    page.clock.install()
    view.history.passes(60)
    view.history.counted({"active": 128})
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    view.monitor.answers.clear()
    page.clock.run_for(5000)
    page.clock.run_for(10_000)
    view.expect_verdict("Lost contact with the monitor since 12:00:02 UTC", "critical")
    expect(page.locator("#notes li").first).to_have_text("No answer within 10 s.")
    view.monitor.error = "The database has not answered within 7 s."
    view.monitor.answers.set()
    view.expect_verdict("The monitor cannot report its state", "critical")
    expect(page.locator("#notes")).to_have_text(view.monitor.error)


def hide(view: View, *, hidden: bool) -> None:
    """Put the tab in the background, or back."""
    view.page.evaluate(
        f"Object.defineProperty(document, 'hidden', {{value: {str(hidden).lower()}, "
        "configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


def test_page_polls_twelve_times_a_minute_but_not_while_hidden(view: View) -> None:
    view.page.clock.install()
    healthy(view.history)
    view.open()
    view.expect_verdict("All 128 open sessions checked on time", "ok")
    before = len(view.requests)
    for _ in range(12):
        with view.page.expect_response("**/api/status"):
            view.page.clock.run_for(5000)
    assert len(view.requests) - before == 12
    hide(view, hidden=True)
    view.page.clock.run_for(60_000)
    assert len(view.requests) - before == 12


def test_page_is_small_and_allows_only_its_own_script() -> None:
    page = operators_page()
    assert len(page.html.encode()) < 45_000
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http:" not in page.html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page.html
