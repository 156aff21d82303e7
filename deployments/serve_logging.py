"""Write our log records to the file that Ray Serve keeps for a replica, at once.

By default they would go to standard error, which Serve turns into records of its own and, in its
throughput-optimised mode, holds back until there are a thousand.
"""

import logging

OURS = ("adapter_store", "deployments", "engine")
SERVE = "ray.serve"


def log_to_serves_file() -> None:
    """Redirect our loggers, in a replica's process. Without effect if Serve has set up no log."""
    # If there is a buffer, its target is the file.
    handlers = [getattr(each, "target", each) for each in logging.getLogger(SERVE).handlers]
    if not handlers:
        return
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = list(handlers)
        logger.propagate = False
        logger.setLevel(logging.INFO)
