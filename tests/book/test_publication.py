"""Pages know their repository where it can be known, and offer notebooks that say what is meant."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbformat
import publication
import pytest


def cloned_from(folder: Path, address: str) -> Path:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "remote", "add", "origin", address], check=True)
    return folder


@pytest.mark.parametrize(
    "address", ["https://github.com/a-b/c.d.git", "git@github.com:a-b/c.d.git"]
)
def test_the_repository_is_where_git_cloned_from(address: str, tmp_path: Path) -> None:
    assert publication._remote(cloned_from(tmp_path, address)) == "a-b/c.d"


@pytest.mark.parametrize("address", ["https://example.org/a/b.git", "/somewhere/else"])
def test_another_place_is_no_repository_that_readers_reach(address: str, tmp_path: Path) -> None:
    assert publication._remote(cloned_from(tmp_path, address)) is None


def test_a_folder_without_git_has_no_repository(tmp_path: Path) -> None:
    assert publication._remote(tmp_path) is None


def configured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, repository: str, language: str = "en"
) -> SimpleNamespace:
    monkeypatch.setenv("GITHUB_REPOSITORY", repository)
    cards = {"enable": False, "image": "logo.png"}
    config = SimpleNamespace(
        html_theme_options={}, ogp_site_url="", ogp_social_cards=cards, language=language
    )
    publication._add_address(SimpleNamespace(srcdir=folder), config)
    return config


def test_buttons_lead_to_the_repository_if_it_is_known(monkeypatch, tmp_path) -> None:
    options = configured(monkeypatch, tmp_path, "a/b").html_theme_options
    assert options["repository_url"] == "https://github.com/a/b"
    assert set(options["launch_buttons"]) == {"binderhub_url", "colab_url"}


def test_there_is_no_button_if_it_is_not_known(monkeypatch, tmp_path) -> None:
    assert configured(monkeypatch, tmp_path, "").html_theme_options == {}


def test_pages_have_a_social_card_where_the_address_of_the_site_is_known(monkeypatch, tmp_path):
    known = configured(monkeypatch, tmp_path, "a/b")
    assert known.ogp_site_url == "https://a.github.io/b/"
    chinese = configured(monkeypatch, tmp_path, "a/b", language="zh_CN")
    assert chinese.ogp_site_url == "https://a.github.io/b/zh/"
    assert known.ogp_social_cards == {"enable": True, "image": "logo.png"}
    assert not configured(monkeypatch, tmp_path, "").ogp_social_cards["enable"]


@pytest.mark.parametrize("made", [True, False])
def test_the_first_page_links_the_book_on_paper_if_there_is_one(made, tmp_path: Path) -> None:
    app = SimpleNamespace(
        outdir=tmp_path / "html",
        builder=SimpleNamespace(format="html"),
        config=SimpleNamespace(root_doc="book/intro", language="en"),
    )
    app.outdir.mkdir()
    if made:
        (tmp_path / "latex").mkdir()
        (tmp_path / "latex" / "ewc_lib.pdf").write_bytes(b"%PDF")
    context = {"body": ""}
    publication._offer_paper(app, "book/intro", "", context, None)
    publication._copy_paper(app, None)
    assert ("../ewc_lib.pdf" in context["body"]) == made
    assert (app.outdir / "ewc_lib.pdf").exists() == made


def test_the_offered_notebook_shows_the_computed_numbers(tmp_path: Path) -> None:
    executed = tmp_path / "jupyter_execute" / "x.ipynb"
    executed.parent.mkdir()
    cell = nbformat.v4.new_markdown_cell("It is {glue:text}`share:.0%`.")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), executed)
    glued = {"share": {"data": {"text/plain": "0.25"}}, "name": {"data": {"text/plain": "'a'"}}}
    executed.with_suffix(".glue.json").write_text(json.dumps(glued))
    app = SimpleNamespace(outdir=tmp_path / "html", builder=SimpleNamespace(format="html"))
    publication._write_notebooks(app, None)
    offered = nbformat.read(tmp_path / "html" / "_sources" / "x.ipynb", as_version=4)
    assert offered.cells[1].source == "It is 25%."
