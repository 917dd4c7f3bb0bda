"""Lambda's entry points: `check` for the loop's ticks, `api` behind the API Gateway."""
