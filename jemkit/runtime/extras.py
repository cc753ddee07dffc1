"""The command that installs an optional dependency, for the hints of error messages."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlparse


def install(extra: str) -> str:
    """The command that installs an extra in the way this jemkit was installed."""
    try:
        direct_url = distribution("jemkit").read_text("direct_url.json")
    except (PackageNotFoundError, OSError):
        direct_url = None
    return command(extra, direct_url)


def command(extra: str, direct_url: str | None) -> str:
    try:
        about = json.loads(direct_url or "{}")
        url, folder = str(about.get("url", "")), about.get("dir_info")
        editable = bool(folder.get("editable", False)) if folder is not None else False
    except (ValueError, AttributeError):
        folder, url, editable = None, "", False
    if folder is None or not url.startswith("file:"):
        return f"pip install 'jemkit[{extra}]'"
    option = "-e " if editable else ""
    return f"pip install {option}'.[{extra}]' in {unquote(urlparse(url).path)}"
