"""What must not reach a log, a message, a manifest or a checkpoint: tokens, passwords, signed queries, webhooks."""

from __future__ import annotations

import re

HIDDEN = "[secret]"

# These begin at the boundary of a word or with a fixed text: a long word must not be searched from each of its letters.
_USER_INFO = re.compile(r"(\b\w+://)[^/\s'\"]*@")
_QUERY = re.compile(r"(\b\w+://[^\s'\"?#]*)([?#][^\s'\"<>)\]]*)")
_WITHOUT_QUERIES = ("hf://", "s3://", "gs://")  # there, `?` is a wildcard and `#` a letter
_NAME_AND_VALUE = re.compile(r"[?#][^/?#]*=")

# Whoever knows the address of a webhook can post to it.
_WEBHOOK = re.compile(
    r"(?i)(https?://(?:hooks\.slack(?:-gov)?\.com|(?:\w+\.)?discord(?:app)?\.com/api/webhooks|[\w.-]*webhook[\w.-]*"
    r"|chat\.googleapis\.com|api\.telegram\.org|[\w.-]*\.logic\.azure\.com|outlook\.office\.com)[/:])[^\s'\"<>)\]]+"
)
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9_]{8,}"
    r"|(?i:\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # Amazon
    r"|\bAIza[A-Za-z0-9_-]{30,}"  # Google
    r"|\bya29\.[A-Za-z0-9_.-]{10,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}|\bglpat-[A-Za-z0-9_-]{16,}"
    r"|\bxox[a-z]-[A-Za-z0-9-]{8,}"  # Slack
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|\bwandb_v1_[A-Za-z0-9_]{8,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)

_SECRET_WORD = (
    r"(?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key"
    r"|credentials?|auth(?:orization)?|signature|webhook(?:[_-]?url)?|netrc)"
)
_AT_THE_END_OF_A_WORD = (
    r"(?:passw(?:or)?d|(?:secret|access|account|api|private)[_-]?(?:access[_-]?)?key"
    r"|(?:access|auth|client|refresh|session)[_-]?(?:token|secret))"
)
# `--token VALUE`, `api_key=VALUE`, `"password": "VALUE"`, `PGPASSWORD=VALUE`, `clientSecret: VALUE`; not `eos_token: x`
# or `total_tokens=1`, which are settings.
_NAMED = re.compile(
    rf"(?i)((?:(?<![A-Za-z])(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!separator_){_SECRET_WORD}|{_AT_THE_END_OF_A_WORD})"
    rf"[\"']?\s*[=:]\s*[\"']?|--(?:[a-z0-9]+-)*{_SECRET_WORD}[ =])([^\s\"',;&]+)"
)
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_.-]){_SECRET_WORD}(?:$|[_.-])|(?:^|_)key(?:$|_)")
_SIGNED = re.compile(r"(?i)[?&#](?:[\w-]*signature|sig|[\w-]*token|[\w-]*credential|[\w-]*key|password|secret)[\w-]*=")


def redact(text: object) -> str:
    """Return the text of an error or a URL without user names, passwords, queries of URLs, webhooks and tokens."""
    without_user = _USER_INFO.sub(r"\1", _WEBHOOK.sub(rf"\1{HIDDEN}", str(text)))
    return _TOKEN.sub(HIDDEN, _QUERY.sub(_without_query, without_user))


def redact_source(text: object) -> str:
    """Return code, a diff or a command line without what `redact` removes and the values of names such as `api_key`."""
    return _NAMED.sub(_without_value, redact(text))


def is_secret_name(name: str) -> bool:
    """Return whether a variable or a key of this name is likely to hold a secret, as ``WANDB_API_KEY`` does."""
    return _SECRET_NAME.search(name) is not None


def holds_secret(text: str) -> bool:
    """Return whether a text holds a password or a signature in a URL, a webhook or a token.

    Queries without a signature are no secrets here: a condition on the rows of data may name one.
    """
    if _USER_INFO.search(text) or _WEBHOOK.search(text) or _TOKEN.search(text):
        return True
    return any(_SIGNED.search(found[2]) for found in _QUERY.finditer(text))


def _without_query(url: re.Match[str]) -> str:
    is_name = url[1].startswith(_WITHOUT_QUERIES) and not _NAME_AND_VALUE.search(url[2])
    return url[0] if is_name else url[1]


def _without_value(found: re.Match[str]) -> str:
    # A name that is assigned a call, an item or an attribute is code, and holds nothing itself.
    value, is_quoted = found[2], found[1].endswith(("'", '"'))
    is_code = not is_quoted and re.match(r"[A-Za-z_][\w.]*[(\[]|[a-z_]\w*\.[a-z_]", value)
    is_short = value == HIDDEN or not re.search(r"[A-Za-z0-9]{6,}", value)
    return found[0] if is_code or is_short else f"{found[1]}{HIDDEN}"
