"""The questions of our own tasks, made here: the same ones on every machine, without a download.

Three things a converted student keeps or loses apart from each other: what it knows (`facts`), what it finds again in
its context (`recall`), and how it builds sentences (`grammar`). The YAML files beside this one tell
lm-evaluation-harness how to ask; its `custom_dataset` calls the functions at the end.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

CHOICES = 4
ITEMS = 100  # of recall at each length
NOUNS = """
anchor apple apron arrow banner barrel basket bell belt bench blanket bottle bowl box branch brick bridge broom brush
bucket button cabin cable candle canoe carpet cart castle chain chair chalk chest clock cloud coat coin collar column
copper corn cotton crown cup curtain desk dish door drawer drum engine fan feather fence field flag flute fork fountain
frame garden gate glass glove hammer harbor hat hill hook horn house iron island jacket jar kettle key kitchen knife
ladder lamp lantern leaf lemon letter lock map market mask mirror mountain nail needle net oar oven paddle palace paper
pearl pencil piano pillow pipe plate pocket pond pot purse quilt rail ribbon ring river road rock roof rope saddle sail
salt school scissors shelf shell ship shirt shoe shovel silver sofa spoon stairs statue stone stove table tent thread
tower train tunnel umbrella vase village violin wagon wall wheel whistle window wire wool
""".split()
PEOPLE = "doctor teacher farmer sailor writer singer painter driver baker lawyer student soldier guest neighbor".split()
THINGS = "cup lamp door table picture bottle letter chair window carpet basket mirror blanket hammer".split()
NEAR = "near behind beside above below opposite".split()
VERBS = [(" is", " are"), (" was", " were"), (" has", " have"), (" does", " do")]
# subject, object and the pronoun that fits the subject: the object is the other one's
COUPLES = "king:queen man:woman boy:girl father:mother uncle:aunt brother:sister husband:wife prince:princess".split()
BLAMED = "admired blamed defended described hurt introduced praised saw surprised trusted".split()


def facts_rows() -> list[dict]:
    """A row a line of facts.tsv: the answer among three others' answers of the same kind, in an order of its own."""
    lines = (Path(__file__).parent / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    asked = [tuple(line.split("\t")) for line in lines]
    draw, rows = random.Random(0), []
    for question, answer, kind in asked:
        others = sorted({other for _, other, same in asked if same == kind} - {answer})
        choices = [answer, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"question": question, "choices": choices, "answer": choices.index(answer), "kind": kind})
    draw.shuffle(rows)  # so that the first N are a sample of all kinds
    return rows


def grammar_rows() -> list[dict]:
    """Minimal pairs: the verb agrees with its subject and not with the noun before it, a pronoun with its subject."""
    draw, rows = random.Random(1), []
    for _ in range(100):
        plural = draw.random() < 0.5
        first, second = draw.choice(THINGS), draw.choice(PEOPLE)
        subject, attractor = (first + "s", second) if plural else (first, second + "s")
        choices = list(draw.choice(VERBS))
        context = f"The {subject} {draw.choice(NEAR)} the {attractor}"
        rows.append({"context": context, "choices": choices, "answer": int(plural), "kind": "agreement"})
    for _ in range(100):
        male, female = draw.choice(COUPLES).split(":")
        feminine = draw.random() < 0.5
        subject, other = (female, male) if feminine else (male, female)
        context = f"The {subject} who knew the {other} {draw.choice(BLAMED)}"
        choices = [" himself", " herself"]
        rows.append({"context": context, "choices": choices, "answer": int(feminine), "kind": "reflexive"})
    draw.shuffle(rows)
    return rows


def recall_rows(pairs: int) -> list[dict]:
    """Contexts of `pairs` lines "word: number" with a word asked again at the end; `pairs` at most len(NOUNS)."""
    draw, rows = random.Random(pairs), []
    for _ in range(ITEMS):
        words, numbers = draw.sample(NOUNS, pairs), draw.sample(range(100, 1000), pairs)
        asked = draw.randrange(pairs)
        lines = [f"{word}: {number}" for word, number in zip(words, numbers, strict=True)]
        context = "\n".join([*lines, f"{words[asked]}:"])
        rows.append({"context": context, "answer": f" {numbers[asked]}", "asked": asked})
    return rows


def facts(**_) -> dict[str, Dataset]:
    return _test_split(facts_rows())


def grammar(**_) -> dict[str, Dataset]:
    return _test_split(grammar_rows())


def recall(pairs: int, **_) -> dict[str, Dataset]:
    return _test_split(recall_rows(pairs))


def _test_split(rows: list[dict]) -> dict[str, Dataset]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
