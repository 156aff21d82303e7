"""The way between an ingress and the replicas: protocol, failover, sockets, router. No HTTP, no text."""
