"""Proves that an adapter acts as its weights say, before a request is answered with it."""
