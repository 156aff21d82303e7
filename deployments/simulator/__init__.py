"""Virtual time around the real scheduler, router and autoscaling policy."""
