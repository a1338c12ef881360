"""Plain prose, one line a paragraph, out of hard-wrapped text and out of wiki markup."""

import html
import re

MIN_CHARACTERS = 40  # of a paragraph: what is shorter is a heading, a caption or a rule


def unwrap(text: str) -> str:
    """Turn hard-wrapped plain text into one line per paragraph, paragraphs separated by a blank line.

    A paragraph ends at a blank line; runs of blanks inside it become one. Rules of stars, plus signs and the
    like, tables of contents and headings (centred or short, without a full sentence) are dropped: a language
    model's perplexity on them measures layout, not English.
    """
    paragraphs = []
    for block in re.split(r"\n[ \t\f]*\n", text.replace("\r\n", "\n").replace("\x1a", "")):
        lines = [line for line in block.splitlines() if re.search(r"[A-Za-z]", line)]
        # a line ends with a hyphen or dash only where the word has one
        paragraph = re.sub(r"\s+", " ", re.sub(r"(?<=\w-)\s*\n\s*|(?<=--)\s*\n\s*", "", "\n".join(lines))).strip()
        sentences = re.search(r"[a-z][.!?:;,]['\")\]]*(\s|$)", paragraph)
        if len(paragraph) >= MIN_CHARACTERS and sentences and paragraph.count(" * ") < 2:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs) + "\n"


def strip_wikitext(text: str) -> str:
    """Turn a MediaWiki page's source into its paragraphs, separated by a blank line.

    Templates, tables, references, formulas, comments, files and categories are dropped; links and emphasis leave their
    words. Headings, lists and indented lines are dropped: only full paragraphs stay.
    """
    text = html.unescape(text)
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|timeline|source|nowiki)\b.*?</\1>", "", text, flags=re.S)
    for innermost in (r"\{\{(?:(?!\{\{|\}\}).)*\}\}", r"\{\|(?:(?!\{\||\|\}).)*\|\}"):
        while re.search(innermost, text, flags=re.S):  # nested ones from the inside out
            text = re.sub(innermost, "", text, flags=re.S)
    link = re.compile(r"\[\[(File:|Image:|Category:)?(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]", re.I)
    for _ in range(2):  # a file's caption holds links of its own
        text = link.sub(lambda found: "" if found[1] else found[2], text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>", "", text)
    paragraphs = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line[:1] not in "*#:;|=!{}[] ")
    kept = [p for p in paragraphs if len(p) >= MIN_CHARACTERS and re.search(r"[a-z][.!?]", p)]
    return "\n\n".join(kept) + "\n"
