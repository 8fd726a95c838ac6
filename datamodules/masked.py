"""Masks secrets in addresses, so that no log, report or error shows them."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:auth\w*|credential|key|passw\w*|pwd|secret|sig|signature|token)=)[^\s&#'\"]*", re.IGNORECASE
)


def masked(text: str) -> str:
    """Masks users and passwords of the addresses in a text, and the tokens and keys of their queries.

    >>> masked("http://user:password@host/v1?api_key=abc&page=2")
    'http://***@host/v1?api_key=***&page=2'
    """
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))
