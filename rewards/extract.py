"""Find the answer that a completion marks."""

import re

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str | None:
    """What the last complete `\\boxed{...}` holds; None if there is none."""
    for match in reversed(list(BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def last_tagged(text: str, tag: str) -> str | None:
    """What the last complete `<tag>...</tag>` holds, stripped; None if there is none."""
    before, closing, _ = text.rpartition(f"</{tag}>")
    _, opening, content = before.rpartition(f"<{tag}>")
    return content.strip() if closing and opening else None


def after_thinking(text: str) -> str | None:
    """The text after the last `</think>`; all of it if it does not think; None if the thinking does not end."""
    _, closing, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return None
    return rest if closing else text
