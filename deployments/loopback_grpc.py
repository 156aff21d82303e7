"""Keep a replica's gRPC server on loopback, on a node that is known by a loopback address.

Calls between deployments arrive there. Ray binds it to all interfaces and has no option for that.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false

from typing import Any, cast

import ray.util
from ray.serve._private import replica

from deployments.config import is_loopback

ANY_ADDRESS = "[::]"


def keep_grpc_on_loopback() -> None:
    """Is called in a replica's constructor: Ray opens the port after that."""
    node = cast(str, ray.util.get_node_ip_address())
    if is_loopback(node):
        serve_replica: Any = replica
        add_port = serve_replica.add_port_to_grpc_server
        serve_replica.add_port_to_grpc_server = _bound_to(node, add_port)


def _bound_to(host: str, add_port: Any) -> Any:
    def add_port_to_grpc_server(server: Any, address: str) -> int:
        return add_port(server, address.replace(ANY_ADDRESS, host))

    return add_port_to_grpc_server
