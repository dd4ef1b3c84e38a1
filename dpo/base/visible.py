"""Texts of data, models and file names made harmless: what is not seen must not steer a terminal or turn a page."""

import unicodedata

CONTROL_PICTURES = 0x2400  # ␀, ␁, …
UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # Unicode categories: controls, formats, private, separators of lines


def visible(text: str) -> str:
    """A line feed as ↵ before the line's end, a tab as ⇥, other characters that are not seen by picture or number."""
    return harmless(text.replace("\n", "↵\n").replace("\t", "⇥"))


def harmless(text: str) -> str:
    """Line feeds and tabs as they are, other characters that are not seen by picture or number."""
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    return f"<U+{code:04X}>" if unicodedata.category(character) in UNSEEN else character
