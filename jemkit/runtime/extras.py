"""The command that installs an optional dependency, for the hints of error messages."""

import json
from importlib.metadata import distribution
from urllib.parse import unquote, urlparse


def install(extra: str) -> str:
    """The command that installs an extra in the way this jemkit was installed."""
    return command(extra, distribution("jemkit").read_text("direct_url.json"))


def command(extra: str, direct_url: str | None) -> str:
    about = json.loads(direct_url or "{}")
    folder = about.get("dir_info")
    if folder is None or not about["url"].startswith("file:"):
        return f"pip install 'jemkit[{extra}]'"
    option = "-e " if folder.get("editable") else ""
    return f"pip install {option}'.[{extra}]' in {unquote(urlparse(about['url']).path)}"
