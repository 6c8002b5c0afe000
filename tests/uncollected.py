"""`holdfast serve` with the collector of cycles turned off, and a window: it counts what only that would have freed.

Whoever connects to the Unix socket is told how many objects, in decimal, have become unreachable since the last time,
and they are freed.

    UNCOLLECTED=<path> python -m tests.uncollected serve
"""

import gc
import os
import socket
import sys
import threading

from api import cli, serve


def tell(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            asking, _ = listening.accept()
            with asking:
                asking.sendall(b"%d" % gc.collect())


def main() -> int:
    gc.disable()
    serve.GC_THRESHOLDS = (0, 0, 0)
    threading.Thread(target=tell, args=(os.environ["UNCOLLECTED"],), daemon=True).start()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
