"""Real faults on a real PostgreSQL, one after the other, under the load of clients who write down what they are told.

    crowd.py       the clients: reserve, buy, cancel, walk away, give up, ask twice, make drops
    troubles.py    every fault by name: of the database, of its commits, of the engine
    places.py      what a fault needs of the machine: a small disk, a network of its own, a clock that can be set
    campaign.py    one PostgreSQL, its engines, a crowd and a list of faults; then the verdict
    tally.py       what was done and what came of it, as figures

`python -m tests.proof.faults` runs as many of them as are asked for; `tests/proof/test_faults.py` runs a few of each.
"""
