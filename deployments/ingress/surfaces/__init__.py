"""Surfaces: the routes of one API each. A surface parses requests and hands them to Ingress."""
