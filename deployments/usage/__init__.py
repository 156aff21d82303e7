"""Metering: what each request used, kept through crashes, uploaded once, summed and priced."""
