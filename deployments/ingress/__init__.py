"""HTTP: routes, requests, replies, streaming, metrics. Only here a status code is known."""
