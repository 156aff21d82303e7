"""The repository's Markdown pages, taken apart: fenced blocks, links, headings, inline code.

A fenced block of commands says in its first line how it is checked: `sh` is run by
`test_docs_commands`, `sh server` and `python server` by `deployments/test_ray`, and
`sh norun: <reason>` by nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "findings" / "README.md",
    ROOT / "tests" / "bench" / "LOG.md",
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `info` is what stands behind its opening fence."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*infos: str) -> list[Block]:
    """Blocks of all pages, in order; only those with one of these infos, if any are given."""
    found = [block for page in PAGES for block in _blocks_of(page)]
    return [block for block in found if not infos or block.info in infos]


def _blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    opening: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if opening is None and fence is not None:
            opening, lines = (number, fence["indent"], fence["info"].strip()), []
        elif opening is not None and fence is not None:
            found.append(Block(page, opening[0], opening[2], "\n".join(lines) + "\n"))
            opening = None
        elif opening is not None:
            lines.append(line.removeprefix(opening[1]))
    assert opening is None, f"{page}:{opening} is not closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    kept: list[str] = []
    is_inside = False
    for line in page.read_text().splitlines():
        if _FENCE.match(line):
            is_inside = not is_inside
        elif not is_inside:
            kept.append(line)
    return "\n".join(kept)


def links(page: Path) -> list[str]:
    """Targets within the repository."""
    targets: list[str] = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings: list[str] = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def table(page: Path, header: str) -> list[list[str]]:
    """The rows, as stripped cells, of the table whose first line begins with `header`."""
    lines = page.read_text().partition(f"\n{header}")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
