"""Ports for servers that a test starts."""

import random
import socket


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on.

    Below 32768: from there on the kernel lends ports to outgoing connections, and one of them could take
    ours between this look and its use.
    """
    for port in random.sample(range(20_000, 32_768), k=100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of 100 ports is free")
