"""Formulas: the TeX of a page, between dollars, becomes MathML when the site is built.

A hook of mkdocs; `mkdocs.yml` names it. A browser draws MathML itself: no script, and no request.
"""

import re
from html import escape, unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
FUNCTION = re.compile(r"(<mi>(?:log|exp|cos|tanh)</mi>)(?=<mi>|<mover>|<msu[bp]>)")
BRACKET = '<mo stretchy="false">&#x00028;'
WORD = re.compile(rf'<mo((?: movablelimits="true")?>[A-Za-z]{{2,}})</mo>({BRACKET})?')


def mathml(tex: str, *, block: bool) -> str:
    """A formula as MathML, with its TeX as the text for readers without it."""
    made = str(convert(tex, display="block" if block else "inline"))
    if unknown := re.search(r"(\\|&#x0005C;|<mi>&<)\w*", made):
        raise PluginError(f"the formula {tex} has {unknown[0]}, which latex2mathml does not know")
    made = FUNCTION.sub(r'\1<mspace width="0.167em"/>', WORD.sub(spaced, made))
    return made.replace("<math ", f'<math alttext="{escape(tex)}" ', 1)


def spaced(match: re.Match[str]) -> str:
    """A name such as CE or mean, with thin spaces, but none before its bracket."""
    after = "0" if match[2] else "0.167em"
    return f'<mo lspace="0.167em" rspace="{after}"{match[1]}</mo>{match[2] or ""}'


def on_page_content(html: str, page: Any, **_: Any) -> str:
    def formula(match: re.Match[str]) -> str:
        block = match[2] == "["
        made = mathml(unescape(match[3]).strip(), block=block)
        return f'<div class="formula">{made}</div>' if block else made

    try:
        return FORMULA.sub(formula, html)
    except PluginError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
