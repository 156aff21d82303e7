"""Says for the store's log who runs the command."""

import getpass
import socket


def author() -> str:
    """Return the user and the machine, as the operating system calls them."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an id without a name
        user = "a user without a name"
    return f"{user}@{socket.gethostname()}"
