"""Reasoning in a form that clients keep and send back unread: `encrypted_content` and signatures. It hides nothing."""

import base64
import binascii

_MARK = "fathom:"


def seal(reasoning: str) -> str:
    """The reasoning as ASCII."""
    return _MARK + base64.b64encode(reasoning.encode()).decode("ascii")


def unseal(sealed: str) -> str | None:
    """What this server sealed; None for what somebody else did."""
    if not sealed.startswith(_MARK):
        return None
    try:
        return base64.b64decode(sealed.removeprefix(_MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
