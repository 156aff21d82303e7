"""All of Swift in one process: proxy, account, container and object server, one copy of the data.

Runs in .venv-swift, as `server.py FOLDER`. Prints the port of the S3 API once it answers, and ends
when its standard input does, so it cannot outlive the tests. Imports nothing of the project.
"""

import os
import socket
import sys
from pathlib import Path

import eventlet
import eventlet.hubs
import eventlet.wsgi
from swift.common import utils

utils.eventlet_monkey_patch()  # before anything else is imported

from paste.deploy import appconfig  # noqa: E402
from swift.common import wsgi  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402

USER, SECRET = "test:tester", "SKtest"
BACKENDS = ("account", "container", "object")
PAGE_KEYS = 10  # of a listing, so that tests need not write thousands to see a second one
PATIENCE_S = 60  # a busy machine is no reason to call a server broken, or to write a listing later

SWIFT = """
[swift-hash]
swift_hash_path_prefix = any
swift_hash_path_suffix = thing
[storage-policy:0]
name = one
default = yes
"""

DEFAULT = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_address = {folder}/no-log
log_level = CRITICAL
node_timeout = {patience_s}
conn_timeout = {patience_s}
container_update_timeout = {patience_s}
"""

# Swift looks whether an object is there when a PUT begins, and writes at its end. One request at
# a time makes that one step, as the S3 API promises.
OBJECT = """
max_clients = 1
"""

BACKEND = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
error_suppression_interval = 0
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_bucket_listing = {page_keys}
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""


def main(folder: Path) -> None:
    eventlet.hubs.use_hub(utils.get_hub())
    os.fsync = os.fdatasync = lambda _: None  # nothing outlives the tests
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text(SWIFT)
    utils.set_swift_dir(str(folder))
    utils.validate_configuration()
    utils.disable_fallocate()
    sockets = {name: eventlet.listen(("127.0.0.1", 0), backlog=256) for name in BACKENDS}
    for name, listener in sockets.items():
        write_ring(folder / f"{name}.ring.gz", listener.getsockname()[1])
        start(
            folder, name, (OBJECT if name == "object" else "") + BACKEND.format(name=name), listener
        )
    proxy = eventlet.listen(("127.0.0.1", 0), backlog=256)
    user = USER.replace(":", "_")
    text = PROXY.format(user=user, secret=SECRET, page_keys=PAGE_KEYS)
    start(folder, "proxy", text, proxy)
    print(proxy.getsockname()[1], flush=True)
    eventlet.hubs.trampoline(sys.stdin.fileno(), read=True)
    os._exit(0)  # at once: there is nothing to keep


def write_ring(path: Path, port: int) -> None:
    """A ring of one device."""
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    place = {"region": 1, "zone": 1, "device": "disk", "weight": 1.0, "meta": ""}
    address = {"ip": "127.0.0.1", "port": port}
    replication = {"replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0} | place | address | replication)
    builder.rebalance()
    builder.get_ring().save(str(path))


def start(folder: Path, name: str, text: str, listener: socket.socket) -> None:
    """Serve in the background."""
    path = folder / f"{name}.conf"
    path.write_text(DEFAULT.format(folder=folder, patience_s=PATIENCE_S) + text)
    conf = appconfig(f"config:{path}", name=f"{name}-server")
    eventlet.spawn(
        eventlet.wsgi.server,
        listener,
        wsgi.loadapp(str(path), global_conf={"log_name": name}),
        utils.NullLogger(),
        custom_pool=wsgi.RestrictedGreenPool(size=int(conf.get("max_clients", 256))),
        protocol=wsgi.SwiftHttpProtocol,
        capitalize_response_headers=False,  # clients want ETag, not Etag
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
