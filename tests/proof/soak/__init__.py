"""Overload and soak: what a long day and a stampede do to a server, and whether it is the same afterwards."""
