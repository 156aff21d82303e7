"""Keep a replica's gRPC server on loopback, on a node that is known by a loopback address.

Calls between deployments arrive there. Ray binds it to all interfaces and has no option for that.
"""

from typing import Any

import ray.util
from ray.serve._private import replica

from deployments.config import is_loopback

ANY_ADDRESS = "[::]"


def keep_grpc_on_loopback() -> None:
    """Is called in a replica's constructor: Ray opens the port after that."""
    node = ray.util.get_node_ip_address()
    if is_loopback(node):
        replica.add_port_to_grpc_server = _bound_to(node, replica.add_port_to_grpc_server)


def _bound_to(host: str, add_port: Any) -> Any:
    def add_port_to_grpc_server(server: Any, address: str) -> int:
        return add_port(server, address.replace(ANY_ADDRESS, host))

    return add_port_to_grpc_server
