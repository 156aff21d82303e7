"""Everything between an ingress and its replicas: protocol, failover, sockets, router."""
