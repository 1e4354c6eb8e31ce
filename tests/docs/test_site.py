"""The documentation builds as a site without a warning, and is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from blocks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", folder / "doctrees"]
    done = subprocess.run(
        [*command, "docs", folder / "html"], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_is_in_the_menu(site):
    menu = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in menu or page.stem == "index"


def test_formulas_need_no_script(site):
    text = (site / "method.html").read_text()
    assert "<math" in text
    # A bar within a formula would end the cell of a table, and the formula with it.
    assert "\\" not in text
    assert "$" not in text


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*?(?:src|href)="([^"]*)"', page.read_text())
        assert loaded
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))]


def test_no_link_leads_nowhere(site):
    for page in site.glob("*.html"):
        for address in re.findall(r'<a [^>]*href="([^"#]+)[^"]*"', page.read_text()):
            if not re.match(r"\w+:", address):
                assert (page.parent / unquote(address)).exists(), f"{page.name} links to {address}"


def test_links_between_files_work_where_files_are_read_as_they_are():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for address in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not re.match(r"\w+:", address):
                assert (page.parent / address).exists(), f"{page.name} links to {address}"


def test_links_to_a_part_of_a_page_find_it():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for address, anchor in re.findall(r"\]\(([^)#\s:]*\.md|)#([^)\s]+)\)", page.read_text()):
            target = page.parent / address if address else page
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            found = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in found, f"{page.name} links to {address}#{anchor}"


def test_the_pictures_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert Path(page.parent / picture).stat().st_size < 500_000
