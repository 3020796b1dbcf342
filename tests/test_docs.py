"""Links in the documentation."""

import re

import pytest

from tests.processes import REPOSITORY

PAGES = sorted(
    path
    for pattern in ('*.md', 'docs/**/*.md', 'benchmarks/*.md')
    for path in REPOSITORY.glob(pattern)
)
# Not in code, where brackets are something else.
CODE = re.compile(r'^```.*?^```|`[^`\n]*`', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\[[^\]]*\]\(([^()\s]+)\)')


def links(page):
    targets = LINK.findall(CODE.sub('code', page.read_text(encoding='utf-8')))
    return [target for target in targets if '://' not in target and 'mailto:' not in target]


def anchors(page):
    """What GitHub makes of the headings of a page."""
    text = re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.DOTALL | re.M)
    found = []
    for heading in re.findall(r'^#+ +(.+?) *$', text, re.MULTILINE):
        heading = LINK.sub(lambda link: link[0][1:].partition(']')[0], heading)
        anchor = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        found.append(f'{anchor}-{found.count(anchor)}' if anchor in found else anchor)
    return found


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    dead = []
    for link in links(page):
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_links_are_found():
    assert sum(len(links(page)) for page in PAGES) > 30
