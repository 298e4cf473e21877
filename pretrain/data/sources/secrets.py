"""What must not reach a log, a message, a manifest or a checkpoint: tokens, passwords, signed queries."""

import re

_USER_INFO = re.compile(r"(\w+://)[^/\s@'\"]*@")
_QUERY = re.compile(r"(\w+://[^\s'\"?#]*)([?#][^\s'\"<>)\]]*)")
_WITHOUT_QUERIES = ("hf://", "s3://", "gs://")  # there, `?` is a wildcard and `#` a letter
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}|(?i:\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}")


def redact(text: object) -> str:
    """Return the text of an error or a URL without user names, passwords, queries of URLs, and tokens."""
    without_user = _USER_INFO.sub(r"\1", str(text))
    return _TOKEN.sub("[secret]", _QUERY.sub(_without_query, without_user))


def _without_query(url: re.Match[str]) -> str:
    is_name = url[1].startswith(_WITHOUT_QUERIES) and "=" not in url[2]
    return url[0] if is_name else url[1]
