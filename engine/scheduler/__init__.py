"""Every decision of the engine, in plain Python: no tensor, clock or random source."""
