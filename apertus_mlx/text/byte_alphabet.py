"""The characters by which a byte-level vocabulary writes bytes."""

from __future__ import annotations


def _byte_level_alphabet() -> dict[int, str]:
    """Return GPT-2's one printable character for each byte, as byte-level BPE writes tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(b for b in range(256) if b not in alphabet):
        alphabet[byte] = chr(256 + offset)
    return alphabet


CHARACTER_OF_BYTE = _byte_level_alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
