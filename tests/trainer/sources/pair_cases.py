"""Pairs whose rule a model of a few thousand weights can learn: the reply with more characters before `A` is chosen."""

import json
import random
from pathlib import Path

from tests.trainer.sources.reward_cases import low_characters

PLACES = 8


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Pairs of random replies to different sums, one row in each line."""
    rng = random.Random(seed)
    lines = []
    while len(lines) < count:
        replies = sorted((_reply(rng) for _ in range(2)), key=low_characters)
        if low_characters(replies[0]) < low_characters(replies[1]):
            prompt = f"{rng.randint(10, 99)} + {rng.randint(10, 99)}="
            lines.append(json.dumps({"prompt": prompt, "chosen": replies[1], "rejected": replies[0]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _reply(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(33, 127)) for _ in range(rng.randint(1, PLACES)))
