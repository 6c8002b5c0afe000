"""Bytes that nobody should send: what Holdfast makes of them on every wire that it has.

    python -m tests.proof.fuzz lane --cases 100000        requests, to both lanes: they must answer alike
    python -m tests.proof.fuzz frames --cases 100000      viewers' sockets, streams of events, Socket.IO

Case `k` of a seed depends on those two numbers alone; a failure prints them, the command that plays it again, and the
shortest bytes that still fail.
"""
