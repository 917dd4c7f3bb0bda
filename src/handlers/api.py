"""The API's Lambda: health, status, the page, the trigger."""

from handlers import cold_start  # noqa: F401 (imports with the garbage collector off)

# isort: split
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools.event_handler import APIGatewayRestResolver

from handlers.check import worker
from handlers.dashboard import dashboard_url
from handlers.routes import add_routes

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

app = APIGatewayRestResolver()
add_routes(app, worker, dashboard=lambda: dashboard_url(os.environ))


def handler(event: Mapping[str, Any], context: "LambdaContext") -> dict[str, Any]:
    """Answer one API Gateway (REST, proxy integration) request."""
    return app.resolve(event, context)
