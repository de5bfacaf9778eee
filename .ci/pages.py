"""Do README.md and the other pages name what is there? Every link, anchor, script, flag, file, test and name.

python .ci/pages.py    # exit code 1, and a line for each that is missing
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*.md")), *sorted(ROOT.glob("lesson/*.md"))]
SHIPPED = ("assets/", "experiments/", "lesson/")  # files of these folders are part of the repository
MADE_BY_COMMANDS = ("runs/", "experiments/results/")
FILES = [path for folder in (".", "experiments", "lesson") for path in sorted((ROOT / folder).glob("*.py"))]
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
PASSES_ON = {"experiments/compare.py": "train_cifar.py"}  # flags that a script does not know go to another


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            wrong.append(f"link to {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors_of(target):
            wrong.append(f"anchor of {link}")
    return wrong


def code_blocks(text: str) -> list[str]:
    """What is between fences, or indented by four columns; lines that end with a backslash are joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    return fenced + indented


def flags_of(script: str) -> set[str]:
    """The flags that a script's parser names, and those of the script that it passes others to."""
    flags = {"--help", *re.findall(r"""["'](--[a-z][a-z-]*)["']""", (ROOT / script).read_text(encoding="utf-8"))}
    if script in PASSES_ON:
        flags |= flags_of(PASSES_ON[script])
    return flags


def wrong_commands(page: Path) -> list[str]:
    wrong = []
    for block in code_blocks(page.read_text(encoding="utf-8")):
        lines = [line for line in block.splitlines() if not re.search(r"\b(pip|git|pytest)\b", line)]
        code = re.sub(r"accelerate launch .*?(?=\S+\.py)", "python ", "\n".join(re.sub(r" #.*", "", z) for z in lines))
        scripts = re.findall(r"python (\S+\.py)", code)
        missing = [script for script in scripts if not (ROOT / script).exists()]
        wrong += [f"script {script}" for script in missing]
        if not scripts or missing:
            continue
        named = [word for word in re.findall(r"\S+\.py", code) if (ROOT / word).exists()]  # lesson/run.py runs others
        known = set().union(*(flags_of(script) for script in named))
        flags = re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        wrong += [f"flag {flag}" for flag in flags if flag not in known]
        for path in re.findall(r"(?<![\w/.-])[\w./-]+\.(?:pt|json|png|ipynb|html)\b", code):
            if path.startswith(SHIPPED) and not path.startswith(MADE_BY_COMMANDS) and not (ROOT / path).exists():
                wrong.append(f"file {path}")
    return wrong


def wrong_names(page: Path) -> list[str]:
    """Tests that -k would not find, and names in the text, `like_this`, that no source file has."""
    text = page.read_text(encoding="utf-8")
    tests = " ".join(re.findall(r"def (test_\w+)", SOURCES))
    selected = re.findall(r'-k (?:"([\w ]+)"|(\w+))', text)
    parts = [part for pair in selected for part in "".join(pair).split(" or ")]
    names = re.findall(r"`((?:\w+\.)*[A-Za-z]\w*_\w+)`", text)
    wrong = [f"test {part}" for part in parts if part not in tests]
    return wrong + [f"name {name}" for name in names if name.split(".")[-1] not in SOURCES]


def main() -> int:
    count = 0
    for page in PAGES:
        for what in wrong_links(page) + wrong_commands(page) + wrong_names(page):
            print(f"{page.relative_to(ROOT)}: no {what}")
            count += 1
    print(f"{len(PAGES)} pages, {count} things that are not there")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
