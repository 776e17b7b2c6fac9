"""The settings of the Chinese edition, and its place in the site.

The edition has the sources and the executed chapters of the English one. Run as a program, this
writes its settings, those of `_config.yml` with a few changed; with `--publish` it puts the built
pages into the site, without the files that both editions have.
"""

import argparse
import filecmp
import re
import shutil
from pathlib import Path

import yaml
from execution import CACHE
from fingerprints import ROOT
from translation import LANGUAGE

NAME = "Fisher 信息与弹性权重巩固"
FOLDER = ROOT / "_build" / "zh"
SITE = ROOT / "_build" / "html"
LEFT_OUT = {"sphinx.ext.viewcode"}  # the code of the package is in the English edition
LICENCE = '<a href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>'
FOOTER = f"<p>文字：{LICENCE}。代码：MIT。</p>"
SHARED = "_static", "_sources", "_images"
WORDS = {
    "html_title": NAME,
    "ogp_site_name": NAME,
    "togglebutton_hint": "点击显示",
    "togglebutton_hint_hide": "点击隐藏",
}


def settings() -> dict[str, object]:
    """Return the settings of the edition."""
    found = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    found["title"] = NAME
    found["execute"]["cache"] = str(CACHE)
    found["author"] = "ewc_lib 的作者们"
    found["html"]["extra_footer"] = FOOTER
    sphinx = found["sphinx"]
    own = sphinx["local_extensions"]
    sphinx["local_extensions"] = {name: str(ROOT / path) for name, path in own.items()}
    sphinx["extra_extensions"] = [e for e in sphinx["extra_extensions"] if e not in LEFT_OUT]
    sphinx["config"] |= {"language": LANGUAGE, **WORDS}
    sphinx["config"]["html_theme_options"]["search_bar_text"] = "搜索本书"
    return found


def publish(pages: Path, site: Path) -> None:
    """Move built pages into a site; they take from it the files that are the same there."""
    edition = site / "zh"
    shutil.rmtree(edition, ignore_errors=True)
    shutil.move(pages, edition)
    both = {
        path.relative_to(edition).as_posix()
        for folder in SHARED
        for path in (edition / folder).rglob("*")
        if path.is_file() and _is_same(path, site / path.relative_to(edition))
    }
    for page in edition.rglob("*.html"):
        page.write_text(_from_site(page.read_text("utf-8"), both), "utf-8")
    for name in both:
        (edition / name).unlink()


def _is_same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _from_site(html: str, both: set[str]) -> str:
    def lead(match: re.Match[str]) -> str:
        return f"{'../' * (match['file'] in both)}{match[0]}"

    folders = "|".join(SHARED)
    return re.sub(rf'(?<==")(?:\.\./)*(?P<file>(?:{folders})/[^"?#]+)', lead, html)


def main() -> None:
    """Write the settings, or publish the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="put the pages into the site")
    if parser.parse_args().publish:
        publish(FOLDER / "_build" / "html", SITE)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings(), allow_unicode=True, sort_keys=False)
    (FOLDER / "_config.yml").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
