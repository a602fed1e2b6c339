"""Rewards for runs of the tiny model, most of which misbehave."""


def low_characters(completion: str) -> float:
    """Share of the characters before `A` in ASCII: a random model gets about a half, and can learn."""
    return sum(character < "A" for character in completion) / max(1, len(completion))


def always_fails(completion: str) -> float:
    raise RuntimeError("this grader is broken")


def low_first(completion: str) -> float:
    """1 where the first character is before `A`, else 0: two samples of the tiny model agree about every other time."""
    return float(completion[:1] < "A")


def constant(completion: str) -> float:
    return 0.5


def huge(completion: str) -> float:
    """Finite, but neither its square nor a float32 can hold it."""
    return 1e300 * (len(completion) % 3)


def slow_low_characters(completion: str) -> float:
    import time

    time.sleep(0.05)
    return low_characters(completion)


def fails_on_some(completion: str) -> float:
    if completion[:1] > "M":
        raise RuntimeError("not this one")
    return 1.0 + low_characters(completion)
