"""The path of a remote source, as far as it can be judged without asking a server."""

import re
from urllib.parse import urlsplit

SCHEMES = ("hf", "https", "http", "s3", "gs")
_HUB = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+(@(refs/(convert|pr)/)?[^/@]+)?(/.*)?")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>.*)", re.IGNORECASE | re.DOTALL)


def is_remote(path: str) -> bool:
    """Return whether the path of a source is a URL such as ``hf://...``, whose files a lock lists."""
    return _URL.match(path) is not None


def path_problem(path: str) -> str | None:
    """Return what is wrong with the path of a source; None if nothing is.

    The message never shows the path, which may hold a secret.
    """
    found = _URL.match(path)
    if found is None:
        return None
    scheme, rest = found["scheme"].lower(), found["host"] + found["path"]
    # `year=202?/month=*` is a pattern, `?name=value` a query.
    secret = "@" in found["host"] or re.search(r"\?[^/]*=", rest)
    if secret or (scheme in ("http", "https") and re.search("[?#]", rest)):
        return (
            "a URL with a password, a query or a fragment cannot be used, since it would be stored with the run: give "
            "a plain URL, and credentials in the environment"
        )
    if scheme not in SCHEMES:
        return f"unknown kind of URL {scheme}://, expected {'://, '.join(SCHEMES)}:// or a path of this machine"
    if scheme == "hf":
        good = _HUB.fullmatch(path) is not None and ".." not in path.split("/")
        return None if good else "expected hf://datasets/ORG/NAME@REVISION/PATH, PATH being a file, a folder or a glob"
    if scheme in ("s3", "gs"):
        return None if found["host"] else f"expected {scheme}://BUCKET/PATH"
    if "*" in rest or rest.endswith("/"):
        return "folders and patterns cannot be listed over HTTP: name each file as a source"
    try:
        parts = urlsplit(path)
        good = bool(parts.hostname and parts.path.strip("/")) and parts.port != 0
    except ValueError:
        good = False
    return None if good else "expected https://HOST/PATH of a file"
