"""Texts that cells compute are translated with their numbers left where they are."""

import json
import re
from types import SimpleNamespace

import pytest
from translation import _link_editions, masked, translated, translated_part

CHINESE = {
    "{0} of {1} images": "{1} 张图像中的 {0} 张",
    "accuracy & loss": "准确率与损失",
    "strength": "强度",
    "A bar of {0}": "长 {0} 的条",
}


def translate(message: str) -> str:
    return CHINESE.get(message, message)


def test_numbers_are_taken_out_of_a_text() -> None:
    assert masked("−1.5 of 1,437 at 1e-17") == ("{0} of {1} at {2}", ["−1.5", "1,437", "1e-17"])


def test_a_text_is_translated_with_its_numbers_in_their_new_order() -> None:
    assert translated("19 of 20 images", translate) == "20 张图像中的 19 张"


def test_what_has_no_translation_or_is_no_word_stays() -> None:
    for text in ("another text 3", "0.5", "θ₁", "λ = 3", " "):
        assert translated(text, translate) == text


def test_the_texts_of_a_figure_are_translated_and_nothing_else() -> None:
    data = json.dumps([{"value": "1", "text": "19 of 20 images"}])
    script = 'if (a > b && "strength") { strength(); }'
    html = (
        '<div aria-label="A bar of 3" id="strength"><text x="1">accuracy &amp; loss</text>'
        '<input aria-valuetext="19 of 20 images"><label>strength</label> '
        f'<script type="application/json">{data}</script><script>{script}</script></div>'
    )
    found = translated_part(html, translate)
    for text in ("长 3 的条", ">准确率与损失<", '"20 张图像中的 19 张">', ">强度<"):
        assert text in found
    assert 'id="strength"' in found
    assert script in found
    read = json.loads(found.split('json">')[1].split("</script>")[0])
    assert read[0]["text"] == "20 张图像中的 19 张"


def test_data_in_a_script_hold_no_markup() -> None:
    html = '<script type="application/json">["a \\u003c b"]</script>'
    assert "<b>" not in translated_part(html, lambda message: "<b>")


@pytest.mark.parametrize("site", ["", "https://a.org/b/"])
@pytest.mark.parametrize(
    ("language", "page", "other"),
    [
        ("en", "book/x", "../zh/book/x.html"),
        ("zh_CN", "book/x", "../../book/x.html"),
        ("en", "_modules/ewc_lib/x", "../../zh/book/intro.html"),
        ("en", "search", "zh/search.html"),
    ],
)
def test_a_page_links_the_same_page_of_the_other_edition(
    language: str, page: str, other: str, site: str
) -> None:
    address = f"{site}zh/" if site and language == "zh_CN" else site
    config = SimpleNamespace(language=language, root_doc="book/intro", ogp_site_url=address)
    context: dict[str, str] = {}
    _link_editions(SimpleNamespace(config=config), page, "", context, None)
    assert context["other_edition"] == other
    found = dict(re.findall(r'hreflang="([^"]+)" href="([^"]+)"', context.get("metatags", "")))
    places = {"en": f"{site}{page}.html", "zh-CN": f"{site}zh/{page}.html"}
    assert found == (places if site and not page.startswith("_modules") else {})
