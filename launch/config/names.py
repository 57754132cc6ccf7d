"""Validates names of hosts, variables and jobs before they reach a command line."""

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
    """Check a DNS name or an IP address. Raises ValueError, also for options (-oProxyCommand=…) and user@host."""
    if len(text) <= 253 and _HOST.fullmatch(text):
        return text
    try:
        ipaddress.ip_address(text)
        if not _ADDRESS.fullmatch(text):  # that module accepts any zone, as in fe80::1%eth0
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is no host name: letters, digits, dots and dashes, or an IP address") from None
    return text


def same_host(name: str) -> str:
    """A key that all spellings of a host share: DNS ignores case and a final dot, and IP addresses have several forms."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def variable_name(text: str) -> str:
    """Check the name of an environment variable. Raises ValueError."""
    if not _VARIABLE.fullmatch(text):
        raise ValueError(f"{text!r} is no name of an environment variable: letters, digits and underscores")
    return text


def word(text: str) -> str:
    """Check a scheduler's name (partition, account, class); may be empty. Raises ValueError."""
    if text and not _WORD.fullmatch(text):
        raise ValueError(f"{text!r}: letters, digits and _.@%+:=,- only, a letter or digit first")
    return text


def interface_name(text: str) -> str:
    """Check the name of a network interface; may be empty. Raises ValueError."""
    if text and not _INTERFACE.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a network interface, such as eth0 or ib0")
    return text


def plain_text(text: str) -> str:
    """Check a value that is passed on exactly. Raises ValueError for NUL, which no command line can hold."""
    if "\0" in text:
        raise ValueError("it has a NUL byte, which no environment and no command line can hold")
    return text


def one_line(text: str) -> str:
    """Check text for line breaks and control characters. Raises ValueError."""
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
        raise ValueError(f"{text!r}: one line of text, without control characters")
    return text


Host = Annotated[str, AfterValidator(host_name)]
Variable = Annotated[str, AfterValidator(variable_name)]
Word = Annotated[str, AfterValidator(word)]
Interface = Annotated[str, AfterValidator(interface_name)]
Plain = Annotated[str, AfterValidator(plain_text)]
Line = Annotated[str, AfterValidator(one_line)]
