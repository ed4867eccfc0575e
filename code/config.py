"""Read and write files of flags (`train.py @FILE`), such as the config.txt of runs: `--flag value` lines and # comments."""
import argparse
import re
from pathlib import Path

FLAG = re.compile(r"(--\w+)(?:(?:=|\s+)(.*))?", re.ASCII | re.DOTALL)
NOT_OF_THE_RUN = "help", "resume", "reset"  # flags that do not change what is computed
HEADER = "# Flags of a run: `python train.py @FILE` repeats it, and flags after @FILE override those in it.\n"


def expand(argv: list[str]) -> list[str]:
    """Replace each @FILE among the arguments by the flags in that file; raises ValueError for what cannot be read."""
    expanded = []
    for word in argv:
        expanded += read_flags(Path(word[1:])) if word.startswith("@") else [word]
    return expanded


def read_flags(path: Path) -> list[str]:
    """Return the flags of a file, each as `--flag` or `--flag=value`; raises ValueError with the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"@{path}: cannot read ({getattr(error, 'strerror', None) or error})") from None
    flags = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = FLAG.fullmatch(line)
        if not match or " --" in line or "\0" in line:
            raise ValueError(f"@{path}, line {number}: {line[:80]!r} is not of the form --flag value")
        flags.append(match[1] if match[2] is None else f"{match[1]}={match[2]}")
    return flags


def to_text(args: argparse.Namespace, actions: list[argparse.Action]) -> str:
    """Return the flags as the text of a file that repeats the run.

    Flags that were on the command line are lines of the file. The others, from presets and defaults, are comments, because
    some flags have an effect only if they are given, such as the sizes of a network that is loaded from a checkpoint.
    """
    lines = {True: [], False: []}
    for action in actions:
        flag, value = action.option_strings[0], getattr(args, action.dest, None)
        if action.dest in NOT_OF_THE_RUN or value is None or value is False:
            continue
        text = format_value(action.dest, value)
        if text != text.strip() or re.search(r"[\r\n]| --", text):
            lines[False].append(f"# {flag} {text!a}: this value cannot be written in a file of flags\n")
            continue
        line = flag if value is True else f"{flag} {text}" if text else f"{flag}="
        given = action.dest in args.given
        lines[given].append(f"{line}\n" if given else f"# {line}\n")
    return "".join([HEADER, *lines[True], "# Presets and defaults:\n", *lines[False]])


def format_value(name: str, value: object) -> str:
    """Return the value of a flag as it is given on the command line."""
    if type(value) not in (list, tuple):
        return str(value)
    if name == "upcycle":
        return "+".join(f"{weight!r}*{view}" for weight, view in value)
    return ("-" if name in ("decay", "history_every") else ",").join(map(str, value))


def differences(before: str, after: str) -> list[tuple[str, str, str]]:
    """Return (flag, new value, old value) of the flags in which the texts of two files of flags differ."""
    old, new = ({match[1]: match[2] or "given" for match in map(FLAG.fullmatch, re.split(r"\n(?:# )?", text)) if match}
                for text in (before, after))
    return [(flag, new.get(flag, "not given"), old.get(flag, "not given"))
            for flag in sorted(old.keys() | new.keys()) if old.get(flag) != new.get(flag)]
