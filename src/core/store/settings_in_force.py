"""The settings in force, as `GET /api/status` returns them."""

from pathlib import Path

from core.billing.settings import CREDENTIALS, listed
from core.database.address import (
    Auth,
    DatabaseAddress,
    DatabaseSecret,
    IamDatabase,
    MySQLAddress,
    Tls,
)
from core.domain.model import JsonObject
from core.settings import Settings


def settings_in_force(settings: Settings) -> JsonObject:
    """Every setting by the name of its variable; for a secret, only whether it is set."""
    reader = settings.status_reader
    credentials = settings.credentials or {}
    ok, not_found = settings.billing_status_codes
    late = settings.late_payments_for
    return {
        **{name: "set" if name in credentials else None for name in CREDENTIALS},
        "APIKEY_SECRET_ARN": settings.api_key_secret_arn,
        **_database_settings(settings.database),
        "BILLING_API_URL": settings.billing_api_url,
        "ALLOW_HTTP": settings.allow_http,
        "BILLING_HEADERS": str(settings.billing_headers),  # their names
        "BILLING_TOKEN_URL": settings.billing_token_url,
        "BILLING_OK": listed(ok),
        "BILLING_NOT_FOUND": listed(not_found),
        "CHECK_INTERVAL_SECONDS": settings.interval_seconds,
        "CHECK_CADENCE": str(settings.cadence),
        "CHECK_BACKOFF_MAX_SECONDS": settings.backoff_max_seconds,
        "REQUEST_TIMEOUT_SECONDS": settings.request_timeout_seconds,
        "MAX_CONCURRENCY": settings.max_concurrency,
        "MAX_WORKERS": settings.max_workers,
        "BILLING_MAX_PER_SECOND": settings.billing_max_per_second,
        "STATUS_UPDATES": reader is not None,
        "BILLING_STATUS_PATH": reader.path if reader else None,
        "BILLING_STATUS_MAP": dict(reader.words) if reader else None,
        "BILLING_ID_PATH": reader.id_path if reader else None,
        "BILLING_AMOUNT_PATH": reader.amount_path if reader else None,
        "BILLING_CURRENCY_PATH": reader.currency_path if reader else None,
        "SESSION_EXPIRES_AFTER": settings.expires_after_seconds,
        "LATE_PAYMENTS_FOR": int(late.total_seconds()) if late else None,
        "LATE_STATUS_UPDATES": settings.late_status_updates,
        "EVENT_BUS_NAME": settings.event_bus_name,
        "LOG_LINES_ACTIVE": settings.log_lines_active,
        "DEBUG": settings.debug,
    }


def _database_settings(address: DatabaseAddress) -> JsonObject:
    found: JsonObject = {
        "DATABASE_URL": None,
        "DATABASE_SECRET_ARN": None,
        "DATABASE_HOST": None,
        "DATABASE_PORT": None,
        "DATABASE_NAME": None,
        "DATABASE_TLS": Tls.PREFER,
        "DATABASE_AUTH": Auth.SECRET,
        "DATABASE_USER_ARN": None,
    }
    match address:
        case MySQLAddress():
            found["DATABASE_URL"] = f"mysql://{address.host}:{address.port}/{address.database}"
            found["DATABASE_TLS"] = address.tls
        case Path() as path:
            found["DATABASE_URL"] = f"sqlite:///{path}"
        case DatabaseSecret(arn, tls, host, port, name):
            found |= {"DATABASE_SECRET_ARN": arn, "DATABASE_TLS": tls}
            found |= {"DATABASE_HOST": host, "DATABASE_PORT": port, "DATABASE_NAME": name}
        case IamDatabase(user_arn, host, port, name):
            found |= {"DATABASE_USER_ARN": user_arn, "DATABASE_AUTH": Auth.IAM}
            found |= {"DATABASE_HOST": host, "DATABASE_PORT": port, "DATABASE_NAME": name}
            found["DATABASE_TLS"] = Tls.VERIFY
    return found
