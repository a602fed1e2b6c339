"""Finds the marked answer in a completion."""

import re

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`; None if there is none."""
    for match in reversed(list(BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def last_tagged(text: str, tag: str) -> str | None:
    """The content of the last complete `<tag>...</tag>`, stripped; None if there is none."""
    before, closing, _ = text.rpartition(f"</{tag}>")
    _, opening, content = before.rpartition(f"<{tag}>")
    return content.strip() if closing and opening else None


def after_thinking(text: str) -> str | None:
    """The text after the last `</think>`; the whole text without thinking; None if the thinking does not end."""
    _, closing, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return None
    return rest if closing else text
