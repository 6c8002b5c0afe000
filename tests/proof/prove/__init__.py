"""`make prove`: the long set, in one sitting or in several, and the report on what it found.

    make prove                                    the whole long set; Ctrl-C ends it, and keeps what was done
    make prove PROVE_ARGS="--sitting --minutes 60"    of what is still lacking, as much as an hour allows
    make prove PROVE_ARGS="--seeds 2000 --only simulation"
    make prove PROVE_ARGS=--report-only           write the report again

Everything that is run is added to `.proof/sittings.jsonl`, with its commit, and summed up in `.proof/report.md`,
`report.html` and `report.json`. Sittings of other commits are listed; they count with `--since COMMIT`, where their
commit is that one or a later one. Exit code: 1 where an invariant was broken, 2 where a part could not run.

    figures.py     what is promised of the fast set and of the long one; what was done, as figures that add up
    sittings.py    sittings on file: each is kept from its first minute on, whatever ends it
    checkout.py    which commit, which machine
    crew.py        processes that simulate seeds; one that dies or hangs convicts its seed
    commands.py    the other parts, each a command of its own
    parts.py       what each part runs, piece by piece, and what it makes of the outcome
    coverage.py    which cells of command × state × fault the seeds have reached
    screen.py      progress
    report.py      what the report says; `document.py` writes it as Markdown and as HTML
"""
