"""Seeds that always run: each once found something, or reaches what is rare; beside it the word why."""

from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).with_name("corpus.txt")


def seeds() -> dict[int, str]:
    """Seed by seed, why it is kept."""
    kept: dict[int, str] = {}
    for line in FILE.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            seed, _, why = text.partition(" ")
            kept[int(seed)] = why.strip()
    return kept
