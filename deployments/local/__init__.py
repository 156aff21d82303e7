"""Run a server on this machine alone: Ray head, config file, start and stop."""
