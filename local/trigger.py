"""`make trigger`: POST the manual trigger and show the answer; exit code 1 if it failed."""

import argparse
import json
import sys

import httpx

from core.billing.settings import checked_api_key
from core.errors import SettingsError

URL = "http://localhost:3001/api/test/checkout-sessions"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make trigger", description=__doc__)
    parser.add_argument(
        "--url", default=URL, help="URL of the trigger, local or deployed (%(default)s)"
    )
    parser.add_argument("--api-key", help="API key of a deployed monitor, sent as x-api-key")
    arguments = parser.parse_args()
    headers = {}
    try:
        if arguments.api_key:
            headers["x-api-key"] = checked_api_key("--api-key", arguments.api_key)
        answer = httpx.post(arguments.url, headers=headers, timeout=30)
    except SettingsError as error:
        print(f"❌ {error}")
        return 1
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        reason = str(error).rstrip(".")
        print(f"❌ No answer from {arguments.url}: {reason}. Is the monitor running (make run)?")
        return 1
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):  # not the monitor's answer; perhaps a proxy's page
        body = {"message": " ".join(answer.text[:200].split())}
    succeeded = answer.is_success and body.get("success") is True
    print(f"{'✅' if succeeded else '❌'} {answer.status_code} {body.get('message', '')}")
    if summary := body.get("summary"):
        print(json.dumps(summary, indent=2))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
