"""Where our log records go in a replica: to the file that Ray Serve keeps for it, at once.

Left to themselves they would go to standard error, which Serve turns into records of its own and,
in its throughput-optimised mode, holds back until there are a thousand.
"""

import logging

OURS = ("adapter_store", "deployments", "engine")
SERVE = "ray.serve"


def log_to_serves_file() -> None:
    """In a replica's process; without effect where Serve has set up no log."""
    # Behind Serve's buffer, where there is one, is the file.
    handlers = [getattr(each, "target", each) for each in logging.getLogger(SERVE).handlers]
    if not handlers:
        return
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = list(handlers)
        logger.propagate = False
        logger.setLevel(logging.INFO)
