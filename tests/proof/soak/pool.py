"""Keep-alive connections that are given up in the middle of a request, as people do; nobody waits for the new one."""

import errno
import select
import socket
import struct
from typing import Final

from tests.bench.job import Server
from tests.bench.wire import Connections

# Close with a reset: who gives up does not read what still comes, and leaves no port behind in TIME_WAIT.
RESET: Final = struct.pack("ii", 1, 0)
CONNECTING: Final = (0, errno.EINPROGRESS)


class Pool(Connections):
    """`replace` a connection, and find it among the `opened` ones when it stands: a full backlog stalls nobody else."""

    def __init__(self, server: Server, count: int) -> None:
        self._address = (server.host, server.port)
        self._opening: dict[int, socket.socket] = {}
        self._doors = select.poll()
        super().__init__(server, count)

    def replace(self, fd: int) -> None:
        self._sockets[fd].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._drop(fd)
        connecting = socket.socket()
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        failure = connecting.connect_ex(self._address)
        if failure not in CONNECTING:
            raise OSError(failure, f"no new connection: {errno.errorcode.get(failure, failure)}")
        self._opening[connecting.fileno()] = connecting
        self._doors.register(connecting, select.POLLOUT)

    def opened(self) -> list[int]:
        """Connections that stand by now, each named once.

        Raises:
            OSError: one was refused: nobody listens any more.
        """
        if not self._opening:
            return []
        standing = []
        for fd, _ in self._doors.poll(0):
            connected = self._opening.pop(fd)
            self._doors.unregister(fd)
            failure = connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, "a connection was refused")
            self._sockets[fd] = connected
            self.send[fd], self.receive[fd] = connected.sendall, connected.recv
            self.poller.register(fd, select.POLLIN)
            standing.append(fd)
        return standing

    def close(self) -> None:
        for connecting in self._opening.values():
            connecting.close()
        super().close()
