"""HTTP: routes, requests and replies, planning, streaming, metrics. The only folder that knows a status code."""
