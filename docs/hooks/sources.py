"""Links that leave docs/: a file of code becomes a page, a record a file of the site.

A hook of mkdocs; `mkdocs.yml` names it after the reference, whose links it follows too.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown"}
PARTS = re.compile(r"\[([\w ]+)\]\(\.\./README\.md#parts\)")
KINDS = {"initial distribution": "start"}  # whose page is not named as its kind
OWN_LOOP = "In your own training loop"  # a section of README that is a page of the site
ELSEWHERE = {
    "README.md#parts": "reference/index.md",
    "README.md#results": "digits.md",
    "README.md#in-your-own-training-loop": "own-loop.md",
}
"""README has short tables of what pages of the site tell in full."""
SOURCE = '<details class="mkdocstrings-source"'
QUIET = "---\nsearch:\n  exclude: true\n---\n\n"  # code is not what a reader searches for


def outside(markdown: str, depth: int) -> set[str]:
    """The paths outside docs/ to which a page links; `depth` is that of its folder in docs/."""
    return {path.rstrip("/") for up, path, _ in LINK.findall(markdown) if len(up) // 3 > depth}


def fenced(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f'````{LANGUAGES.get(path.suffix, "text")} title="{name}"\n{path.read_text()}\n````\n'


def page(target: str) -> str:
    """A page that shows a file, or all files of a folder."""
    path = ROOT / target
    if target == "README.md":
        section = path.read_text().partition(f"## {OWN_LOOP}\n")[2].partition("\n## ")[0]
        return f"# {OWN_LOOP}\n{section}".replace("](docs/", "](")
    if target == "CHANGELOG.md":
        return path.read_text().replace("](docs/", "](")
    shown = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in LANGUAGES)
    return f"{QUIET}# {target}\n\n" + "\n".join(map(fenced, shown))


def place(target: str) -> str:
    """Where a file outside docs/ stands in the site."""
    if target in ("CHANGELOG.md", "README.md"):
        return "changelog.md" if target == "CHANGELOG.md" else "own-loop.md"
    if target.endswith(".ipynb"):
        return f"notebooks/{Path(target).stem}.md"
    is_data = (ROOT / target).suffix in (".json", ".csv")
    return f"files/{target}" if is_data else f"files/{target}.md"


def on_files(files: Files, config: Any) -> Files:
    wanted = {"CHANGELOG.md", "README.md"}
    for file in files.documentation_pages():
        wanted |= outside(file.content_string, file.src_uri.count("/"))
    for target in sorted(wanted):
        if not (ROOT / target).exists() or target.endswith(".ipynb"):
            continue  # mkdocs reports the link; notebooks have a hook of their own
        where = place(target)
        if where.endswith(".md"):
            made = File.generated(config, where, content=page(target),
                                  inclusion=InclusionLevel.NOT_IN_NAV)  # fmt: skip
        else:
            made = File.generated(config, where, abs_src_path=str(ROOT / target))
        files.append(made)
    return files


def on_page_content(html: str, **_: Any) -> str:
    return html.replace(SOURCE, f"{SOURCE} data-search-exclude")


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    known_pages = {file.src_uri for file in files}
    depth = page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        up, target, anchor = match.group(1), match.group(2).rstrip("/"), match.group(3) or ""
        if len(up) // 3 <= depth:
            return match.group(0)
        known = ELSEWHERE.get(target + anchor)
        return f"]({'../' * depth}{known or place(target) + anchor})"

    def kind(match: re.Match[str]) -> str:
        where = f"reference/{KINDS.get(match.group(1), match.group(1))}.md"
        return f"[{match.group(1)}]({where})" if where in known_pages else match.group(0)

    return LINK.sub(inside, PARTS.sub(kind, markdown))
