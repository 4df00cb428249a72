#!/usr/bin/env python3
"""Checks every Markdown page: links and their anchors, the length of prose lines, and the code paths it names."""

import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PROSE_CHARS_MAX = 120
# As the walkthroughs abbreviate them.
SHORT = {"booking/": "booking-service/src/", "event/": "event-service/src/", "kit/": "service-kit/src/"}
CRATES = ("booking-service", "event-service", "service-kit", "shared-contracts", "load-test", "deploy", "scripts", "docs")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def without_code(text):
    """The lines outside fenced blocks, with their numbers."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, line


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for _, line in without_code(path.read_text()):
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def link_fault(page, target):
    """What is wrong with a link, if anything."""
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return f"{target} does not exist"
    if anchor and anchor not in anchors(path):
        return f"{target}: no such heading"
    return None


def code_path(text):
    """The path in this repository that a code span names, if it names one."""
    for short, long in SHORT.items():
        if re.fullmatch(re.escape(short) + r"[\w./-]+\.rs", text):
            return long + text.removeprefix(short)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", text) and text.split("/")[0] in CRATES:
        return text
    return None


def main():
    """Prints each fault; the exit status says whether there is one."""
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=TOP, check=True, capture_output=True, text=True).stdout
    faults = []
    for name in names.split():
        page = TOP / name
        if not page.exists():
            continue
        for number, line in without_code(page.read_text()):
            at = f"{name}:{number}"
            if len(line) > PROSE_CHARS_MAX and not line.lstrip().startswith("|"):
                faults.append(f"{at}: {len(line)} characters; {PROSE_CHARS_MAX} at most outside tables and code")
            for target in LINK.findall(line):
                if fault := link_fault(page, target):
                    faults.append(f"{at}: {fault}")
            for span in CODE.findall(line):
                path = code_path(span)
                if path and not (TOP / path).exists():
                    faults.append(f"{at}: {path} does not exist")
    print("\n".join(faults) if faults else f"{len(names.split())} pages: links, lines and paths are in order")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
