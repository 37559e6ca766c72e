"""Text for tests: predictable enough to be learned."""

from __future__ import annotations

SENTENCE = "the cat sat on a mat and ate its bread while seven small birds sang to it"


def document(index: int) -> str:
    """Different for every index, predictable enough to be learned."""
    words = SENTENCE.split()
    return " ".join(words[(index + 3 * k) % len(words)] for k in range(40)) + f" end {index}."
