"""Status changes published on an EventBridge bus."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import httpx
import jsonschema
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from core.aws import event_bus
from core.aws.event_bus import EventBus, detail, event_id
from core.domain.model import SessionStatus, StatusChangedEvent
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for

ROOT = Path(__file__).parents[2]
CHANGES = [
    StatusChangedEvent(f"s{n}", f"checkout_{n}", None, SessionStatus.SUCCESS, "paid", NOON, NOON)
    for n in range(10)
]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with mock_aws():
        yield


class Consumer:
    """A bus, and a queue to which a rule sends everything published there."""

    def __init__(self, bus: str) -> None:
        eventbridge, self._sqs = boto3.client("events"), boto3.client("sqs")
        self._queue = self._sqs.create_queue(QueueName="consumer")["QueueUrl"]
        attributes = self._sqs.get_queue_attributes(
            QueueUrl=self._queue, AttributeNames=["QueueArn"]
        )
        eventbridge.create_event_bus(Name=bus)
        pattern = {"source": ["checkout-session-monitor"]}
        eventbridge.put_rule(Name="all", EventBusName=bus, EventPattern=json.dumps(pattern))
        target: Any = {"Id": "queue", "Arn": attributes["Attributes"]["QueueArn"]}
        eventbridge.put_targets(Rule="all", EventBusName=bus, Targets=[target])

    def received(self) -> list[dict[str, Any]]:
        found = []
        while messages := self._sqs.receive_message(
            QueueUrl=self._queue, MaxNumberOfMessages=10
        ).get("Messages"):
            found += [json.loads(message["Body"]) for message in messages]
        return found


def worker_with_bus(shop: Shop, clock: FakeClock) -> Worker:
    answers = httpx.MockTransport(lambda _request: httpx.Response(200, json={"status": "paid"}))
    env = {"STATUS_UPDATES": "true", "EVENT_BUS_NAME": "shop"}
    return Worker(settings_for(shop, **env), transport=answers, clock=clock)


def open_sessions(shop: Shop) -> int:
    [(count,)] = shop.run("SELECT COUNT(*) FROM checkout_session WHERE status = 'open'")
    return int(count)


@pytest.mark.usefixtures("aws")
def test_every_event_matches_the_schema_in_the_docs(mariadb_shop: Shop, clock: FakeClock) -> None:
    consumer = Consumer("shop")
    add_sessions(mariadb_shop, numbered(23))
    worker = worker_with_bus(mariadb_shop, clock)
    assert worker.check_open_checkout_sessions().status_changes == 23
    worker.close()

    received = consumer.received()
    assert sorted(event["detail"]["session_id"] for event in received) == sorted(numbered(23))
    schema = (
        (ROOT / "docs" / "status-updates.md")
        .read_text()
        .partition("```json\n")[2]
        .partition("```")[0]
    )
    for event in received:
        assert event["detail-type"] == "CheckoutSessionStatusChanged"
        jsonschema.validate(event["detail"], json.loads(schema))
    assert open_sessions(mariadb_shop) == 0


@pytest.mark.usefixtures("aws")
def test_if_the_bus_rejects_everything_sessions_stay_open(
    mariadb_shop: Shop,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next pass finds and publishes them."""
    monkeypatch.setattr(event_bus, "RETRY_AFTER_SECONDS", 0)
    Consumer("shop")
    client = boto3.client("events")
    monkeypatch.setattr(event_bus, "_client", lambda: client)
    add_sessions(mariadb_shop, numbered(3))
    worker = worker_with_bus(mariadb_shop, clock)
    with Stubber(client) as stub:
        stub.add_client_error("put_events", "ThrottlingException", "Rate exceeded")
        failed = worker.check_open_checkout_sessions()
    assert (failed.status_changes, failed.unpublished) == (0, 3)
    assert open_sessions(mariadb_shop) == 3
    assert any("No event can be published to shop" in message for message in caplog.messages)
    clock.advance(5)
    assert worker.check_open_checkout_sessions().status_changes == 3
    worker.close()


@pytest.mark.usefixtures("aws")
def test_one_rejected_entry_affects_only_its_session(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other nine of the ten in one call are published."""
    client = boto3.client("events")
    monkeypatch.setattr(event_bus, "_client", lambda: client)
    entries: list[dict[str, str]] = [{"EventId": str(n)} for n in range(10)]
    entries[4] = {"ErrorCode": "InternalFailure", "ErrorMessage": "try again"}
    with Stubber(client) as stub:
        stub.add_response("put_events", {"FailedEntryCount": 1, "Entries": entries})
        taken = EventBus("shop").publish(CHANGES)
    assert sorted({change.session_id for change in CHANGES} - set(taken)) == ["s4"]
    assert "shop rejected the event for session 's4': InternalFailure" in caplog.text


@pytest.mark.usefixtures("aws")
def test_after_a_failed_call_the_bus_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = boto3.client("events")
    monkeypatch.setattr(event_bus, "_client", lambda: client)
    now = 100.0
    bus = EventBus("shop", monotonic=lambda: now)
    with Stubber(client) as stub:
        stub.add_client_error("put_events", "InternalException", "")
        assert bus.publish(CHANGES) == ()
        now += event_bus.RETRY_AFTER_SECONDS - 0.1
        assert bus.publish(CHANGES) == ()
        now += 0.1
        stub.add_response("put_events", {"FailedEntryCount": 0, "Entries": [{"EventId": "1"}] * 10})
        assert len(bus.publish(CHANGES)) == 10


def test_without_a_region_nothing_is_published(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    assert EventBus("shop").publish(CHANGES) == ()
    assert "No event can be published to shop" in caplog.text


def test_an_event_id_is_unique_to_its_change() -> None:
    """The same change always has the same id, another change never has it."""
    change = CHANGES[0]
    assert event_id(change) == event_id(change._replace(changed_at=NOON + timedelta(seconds=5)))
    others = [
        change._replace(session_id="s1"),
        change._replace(new_status=SessionStatus.FAILURE),
        change._replace(first_seen_at=NOON + timedelta(days=1)),
    ]
    assert len({event_id(c) for c in [change, *others]}) == 4


def test_a_late_payment_has_an_event_of_its_own_as_documented() -> None:
    paid = CHANGES[0]._replace(expired_at=NOON - timedelta(days=1), amount="5.00", currency="EUR")
    schema = json.loads(
        (ROOT / "docs/status-updates.md")
        .read_text(encoding="utf-8")
        .partition("### Late payments\n")[2]
        .partition("```json")[2]
        .partition("```")[0]
    )
    found = detail(paid)
    jsonschema.validate(found, schema)
    assert set(schema["properties"]) == set(found)
    assert EventBus("shop")._entry(paid)["DetailType"] == schema["title"]
    assert event_id(paid) != event_id(CHANGES[0])
    expired_again = paid._replace(expired_at=NOON, first_seen_at=NOON)
    assert event_id(paid) == event_id(expired_again)


def test_boto3_is_not_imported_before_the_first_event() -> None:
    program = (
        "import sys; from core.aws.event_bus import EventBus; EventBus('x'); "
        "sys.exit('boto3' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "src", check=False)
    assert ran.returncode == 0
