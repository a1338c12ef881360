"""The reference of commands, from the command line's grammar."""

from __future__ import annotations

import argparse

COMMANDS_HEAD = """\
# Commands

<!-- Written by docs/generate.py from the commands in mohawk/*/commands.py. -->

`mohawk COMMAND --help` prints the same. `python -m mohawk` is `mohawk`. Exit codes and environment variables are under
[Many GPUs, clusters and interruptions](distributed.md#exit-codes).

| command | what it does |
|---|---|
"""


def commands() -> str:
    """The reference of the command line."""
    from mohawk.cli import parser

    top = parser()
    subs = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    lines = [COMMANDS_HEAD.rstrip("\n")]
    for name, sub in subs.choices.items():
        lines.append(f"| [`mohawk {name}`](#mohawk-{name}) | {cell(sub.description)} |")
    for name, sub in subs.choices.items():
        lines += ["", f"## mohawk {name}", "", sentence(sub.description), "", "```text", usage(name, sub), "```"]
        groups: dict[str, list[argparse.Action]] = {}
        for group in sub._action_groups:
            title = "" if group.title in ("positional arguments", "options", "optional arguments") else group.title
            rows = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            groups.setdefault(title, []).extend(rows)
        for title, rows in groups.items():
            if rows:
                lines += ["", f"**{title[0].upper()}{title[1:]}**"] if title else []
                lines += ["", "| argument | meaning |", "|---|---|"]
                lines += [f"| {argument(action)} | {cell(helped(action))} |" for action in rows]
    return "\n".join(lines) + "\n"


def usage(name: str, sub: argparse.ArgumentParser) -> str:
    """One line: positional arguments, what is required, and that there are options."""
    words = [f"mohawk {name}"]
    options = False
    for action in sub._actions:
        if not action.option_strings:
            many = " ..." if action.nargs == "+" else ""
            words.append(f"[{action.metavar}]" if action.nargs == "?" else f"{action.metavar}{many}")
        elif action.required:
            words.append(f"{action.option_strings[-1]} {metavar(action)}")
        elif not isinstance(action, argparse._HelpAction):
            options = True
    return " ".join(words + ["[OPTIONS]"] * options)


def argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    return f"`{' '.join([action.option_strings[-1], *filter(None, [metavar(action)])])}`"


def metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        first, *rest = action.metavar
        return f"{first} [{' '.join(rest)} ...]" if action.nargs == "+" else " ".join(action.metavar)
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    return {"+": f"{name} ...", "*": f"[{name} ...]"}.get(action.nargs, name)


def helped(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    shown = action.default not in (None, False, argparse.SUPPRESS) and action.default != []
    return f"{text}{'; ' * bool(text)}default: {action.default}" if shown and "default" not in text else text


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{", "\\{").replace("*", "\\*")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
