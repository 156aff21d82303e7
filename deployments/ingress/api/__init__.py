"""Requests and replies of each API, one file a surface."""
