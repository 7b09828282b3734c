"""Docstrings name classes as Transformers' do, [`OTOConfig`] or [`~HSPG.step`]: links where the reference has them."""

import re

_NAMED = re.compile(r"\[<code>(~?)([\w.]+)</code>\]")
_TYPE = re.compile(r"(<td>\s*<code>)([^<]*)(</code>)")


def on_page_content(html, **_):
    anchors = sorted(set(re.findall(r'id="(hf_oto\.[\w.]+)"', html)))

    def link(found):
        tilde, name = found.groups()
        target = next((anchor for anchor in anchors if anchor.endswith(f".{name}")), None)
        code = f"<code>{name.rpartition('.')[2] if tilde else name}</code>"
        return f'<a href="#{target}">{code}</a>' if target else code

    html = _TYPE.sub(lambda found: found[1] + re.sub(r"[`*]|\[(?=[`~])|(?<=`)\]", "", found[2]) + found[3], html)
    return _NAMED.sub(link, html)
