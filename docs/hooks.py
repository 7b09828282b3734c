"""Docstrings name classes as Transformers' do, [`OTOConfig`] or [`~HSPG.step`]: links where the reference has them."""

import re

_NAMED = re.compile(r"\[<code>(~?)([\w.]+)</code>\]")


def on_page_content(html, **_):
    anchors = set(re.findall(r'id="(hf_oto\.[\w.]+)"', html))

    def link(found):
        tilde, name = found.groups()
        target = next((anchor for anchor in sorted(anchors) if anchor.endswith(f".{name}")), None)
        code = f"<code>{name.rpartition('.')[2] if tilde else name}</code>"
        return f'<a href="#{target}">{code}</a>' if target else code

    return _NAMED.sub(link, html)
