"""Check a built site: every link between its pages leads somewhere, and every public name is explained on it.

python tests/site_links.py SITE
"""

import html.parser
import sys
import urllib.parse
from pathlib import Path

import laplode


class Page(html.parser.HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        link = found.get("href" if tag == "a" else "src" if tag == "img" else "")
        if link and not urllib.parse.urlsplit(link).scheme and not link.startswith("//"):
            self.links.append(link)


site = Path(sys.argv[1]).resolve()
pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
broken = []
for path, page in pages.items():
    for link in page.links:
        parts = urllib.parse.urlsplit(link)
        target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
        anchor = urllib.parse.unquote(parts.fragment)
        if not target.exists():
            broken.append(f"{path.relative_to(site)}: {link}")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            broken.append(f"{path.relative_to(site)}: {link} (no such anchor)")
anchors = set().union(*(page.anchors for page in pages.values()))
missing = [name for name in dir(laplode) if not name.startswith("_") and f"laplode.{name}" not in anchors]
print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links, {len(broken)} broken")
print("\n".join(broken + [f"no page explains laplode.{name}" for name in missing]))
sys.exit(bool(broken or missing))
