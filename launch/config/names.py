"""What may stand for a host, a variable, a job: anything else is refused before it comes near a command line."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@%+:=,-]*")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,14}")


def host_name(text: str) -> str:
    """A DNS name or an IP address, as given. Raises ValueError: no option (-oProxyCommand=…) and no user@ passes for one."""
    if len(text) <= 253 and _HOST.fullmatch(text):
        return text
    try:
        ipaddress.ip_address(text)
        if not _ADDRESS.fullmatch(text):  # the zone of fe80::1%eth0 may be anything to that module
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is no host name: letters, digits, dots and dashes, or an IP address") from None
    return text


def same_host(name: str) -> str:
    """What all spellings of a host's name have in common: DNS knows neither case nor a dot at the end, and an IP address can
    be written in several ways."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def variable_name(text: str) -> str:
    """The name of an environment variable. Raises ValueError."""
    if not _VARIABLE.fullmatch(text):
        raise ValueError(f"{text!r} is no name of an environment variable: letters, digits and underscores")
    return text


def word(text: str) -> str:
    """A scheduler's name for something (partition, account, class), or nothing. Raises ValueError."""
    if text and not _WORD.fullmatch(text):
        raise ValueError(f"{text!r}: letters, digits and _.@%+:=,- only, a letter or digit first")
    return text


def interface_name(text: str) -> str:
    """The name of a network interface, or nothing. Raises ValueError."""
    if text and not _INTERFACE.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a network interface, such as eth0 or ib0")
    return text


def plain_text(text: str) -> str:
    """A value that goes through exactly, whatever is in it, but for NUL, which no environment or command line can hold."""
    if "\0" in text:
        raise ValueError("it has a NUL byte, which no environment and no command line can hold")
    return text


def one_line(text: str) -> str:
    """Text without line breaks or control characters. Raises ValueError."""
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
        raise ValueError(f"{text!r}: one line of text, without control characters")
    return text


Host = Annotated[str, AfterValidator(host_name)]
Variable = Annotated[str, AfterValidator(variable_name)]
Word = Annotated[str, AfterValidator(word)]
Interface = Annotated[str, AfterValidator(interface_name)]
Plain = Annotated[str, AfterValidator(plain_text)]
Line = Annotated[str, AfterValidator(one_line)]
