"""Traffic: which part of all requests comes from this router, as far as the replicas tell."""

KEPT = 0.98  # of what was counted, with each report
FEW = 20.0  # requests, below which nothing is concluded
ALL = 0.8  # a report may lack what was sent while it was made
MOST = 20.0


class Traffic:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._received = self._sent = 0.0
        self.times = 1.0  # its own requests go into all; at least 1

    def heard(self, num_received: int, num_sent: int) -> None:
        """Note what a replica has received since its last report, and what this router sent it."""
        if num_received < 0:
            return  # it was started again
        self._received = KEPT * self._received + num_received
        self._sent = KEPT * self._sent + num_sent
        if self._received >= FEW:
            part = self._sent / self._received
            self.times = 1.0 if part >= ALL else min(1 / max(part, 1 / MOST), MOST)
