"""The bytes behind the pieces of a byte-level BPE vocabulary; what server and engine must read in the same way."""


def piece_bytes(piece: str) -> bytes:
    """The bytes that a vocabulary entry stands for; an entry outside the byte alphabet stands for its own text."""
    try:
        return bytes([_BYTE_OF[ord(character)] for character in piece])
    except KeyError:
        return piece.encode()


def _byte_characters() -> dict[int, int]:
    """Code point to byte for the 256 printable stand-ins of byte-level BPE.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{byte: byte for byte in own}, **{0x100 + n: byte for n, byte in enumerate(others)}}


_BYTE_OF = _byte_characters()
