"""Macros that a page defines for its formulas, and formulas without them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alloy.data.web.script import read_literal
from alloy.data.web.tex import end_of_group

_DEFINITION = re.compile(
    r"\\(?:(?P<new>(?:re|provide)?newcommand|providecommand|DeclareRobustCommand)\*?\s*(?:\{\s*\\(?P<a>[A-Za-z]+|.)\s*\}|\\(?P<b>[A-Za-z]+|.))"
    r"\s*(?:\[(?P<count>\d)\])?\s*(?:\[(?P<default>[^\[\]]{0,100})\])?"
    r"|[gex]?def\s*\\(?P<def>[A-Za-z]+|.)\s*(?P<parameters>(?:#\d)*)"
    r"|DeclareMathOperator(?P<star>\*?)\s*\{?\s*\\(?P<operator>[A-Za-z]+)\s*\}?"
    r"|DeclarePairedDelimiter\s*\{?\s*\\(?P<pair>[A-Za-z]+)\s*\}?"
    r"|let\s*\\(?P<let>[A-Za-z]+)\s*=?\s*(?P<same>\\(?:[A-Za-z]+|[^A-Za-z])))\s*(?P<body>\{)?"
)  # fmt: skip
_CONFIGURED = re.compile(r"\b[mM]acros['\"]?\s*:\s*(?=\{)")
_CALL = re.compile(r"\\(?:([A-Za-z]+)|.)", re.DOTALL)
_PLACE = re.compile(r"#(\d)")
# what a definition may grow to, and how many a page may have
LONGEST = 2_000
MOST = 2_000
DEEPEST = 30


@dataclass(frozen=True, slots=True)
class Macro:
    """What a command stands for: its text with `#1` to `#9`, how many arguments it takes, the first one's default."""

    body: str
    parameters: int = 0
    default: str | None = None


def read_macros(texts: Iterable[str], scripts: Iterable[str]) -> dict[str, Macro]:
    """Macros by name, from definitions in texts and formulas and from `Macros: {...}` of MathJax and `macros:` of KaTeX."""
    macros: dict[str, Macro] = {}
    for script in scripts:
        if "acros" in script:
            for found in _CONFIGURED.finditer(script):
                value = read_literal(script, found.end())
                for name, body in value.items() if isinstance(value, dict) else ():
                    if (macro := _configured(body)) is not None and len(macros) < MOST:
                        macros[name.removeprefix("\\")] = macro
    for text in texts:
        if "\\" in text:
            macros.update((name, macro) for name, macro, _, _ in _definitions(text))
    return macros


def without_definitions(tex: str) -> str:
    """A formula without the definitions in it; empty where it held nothing else."""
    if "\\" not in tex:
        return tex
    parts, at = list[str](), 0
    for _, _, start, stop in _definitions(tex):
        parts.append(tex[at:start])
        at = stop
    return "".join((*parts, tex[at:])).strip() if at else tex


def closed(macros: Mapping[str, Macro]) -> dict[str, Macro]:
    """Macros whose bodies hold none of the others, those left out that are long, hold definitions or have several lines."""
    plain = {
        name: macro
        for name, macro in macros.items()
        if len(macro.body) <= LONGEST
        and "\n" not in macro.body
        and "def\\" not in macro.body
        and "newcommand" not in macro.body
    }
    done: dict[str, Macro] = {}

    def close(name: str, active: frozenset[str]) -> Macro:
        if name in done:
            return done[name]
        macro, inner = plain[name], dict[str, Macro]()
        for found in _CALL.finditer(macro.body):
            used = found[1] or found[0][1:]
            if used in plain and used not in active and used not in inner and len(active) < DEEPEST:
                inner[used] = close(used, active | {used})
        body = _expanded(macro.body, inner, LONGEST) if inner else macro.body
        result = Macro(macro.body if body is None else body, macro.parameters, macro.default)
        # what was cut short because it names itself is not for others
        if len(active) == 1 or not inner:
            done[name] = result
        return result

    for name in plain:
        done[name] = close(name, frozenset({name}))
    return done


def expand_macros(tex: str, macros: Mapping[str, Macro]) -> str:
    """A formula with macros (as `closed` gives them) written out; as it is where that would make it far longer."""
    if "\\" not in tex or not macros:
        return tex
    result = _expanded(tex, macros, 20 * len(tex) + 10 * LONGEST)
    return tex if result is None else result


def _expanded(tex: str, macros: Mapping[str, Macro], longest: int) -> str | None:
    """With every call replaced; None: too long. Arguments are expanded before they are put in."""
    room = [longest]

    def expand(part: str, depth: int) -> str:
        parts, at = list[str](), 0
        while (found := _CALL.search(part, at)) is not None and room[0] >= 0:
            macro = macros.get(found[1] or found[0][1:])
            if macro is None or depth > DEEPEST:
                parts.append(part[at : found.end()])
                at = found.end()
                continue
            taken = _arguments(part, found.end(), macro)
            if taken is None:
                # what was searched in vain counts, or a formula of open groups would be searched for each of them
                room[0] -= len(part) - at
                parts.append(part[at : found.end()])
                at = found.end()
                continue
            arguments, stop = taken
            body = _filled(macro.body, [expand(argument, depth + 1) for argument in arguments])
            room[0] -= len(body) + 1
            parts.append(part[at : found.start()])
            # a command at the end must not run into a letter
            parts.append(f"{body} " if _ends_in_command(body) and part[stop : stop + 1].isalpha() else body)
            at = stop
        parts.append(part[at:])
        return "".join(parts)

    result = expand(tex, 0)
    return result if room[0] >= 0 else None


def _arguments(tex: str, at: int, macro: Macro) -> tuple[list[str], int] | None:
    """Arguments of a call and where it ends; None: they are not all there."""
    arguments: list[str] = []
    if macro.default is not None:
        start = _behind_space(tex, at)
        end = tex.find("]", start, start + LONGEST) if tex[start : start + 1] == "[" else -1
        arguments.append(tex[start + 1 : end] if end >= 0 else macro.default)
        at = end + 1 if end >= 0 else at
    while len(arguments) < macro.parameters:
        start = _behind_space(tex, at)
        if tex[start : start + 1] == "{":
            end = end_of_group(tex, start)
            if end is None:
                return None
            arguments.append(tex[start + 1 : end - 1])
        else:
            call = _CALL.match(tex, start)
            end = call.end() if call is not None else start + 1
            if start >= len(tex) or tex[start] == "}":
                return None
            arguments.append(tex[start:end])
        at = end
    return arguments, at


def _behind_space(tex: str, at: int) -> int:
    while tex[at : at + 1].isspace():
        at += 1
    return at


def _filled(body: str, arguments: list[str]) -> str:
    def fill(found: re.Match[str]) -> str:
        i = int(found[1]) - 1
        argument = arguments[i] if 0 <= i < len(arguments) else ""
        runs_on = argument[:1].isalpha() and _ends_in_command(body[: found.start()])
        return f" {argument}" if runs_on else argument

    return _PLACE.sub(fill, body) if arguments else body


def _ends_in_command(tex: str) -> bool:
    bare = tex.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return len(bare) < len(tex) and bare.endswith("\\")


def _definitions(text: str) -> Iterable[tuple[str, Macro, int, int]]:
    """Name, macro, start and end of each definition."""
    at = 0
    while (found := _DEFINITION.search(text, at)) is not None:
        at = found.end()
        if found["let"]:
            yield found["let"], Macro(found["same"]), found.start(), found.end("same")
            at = found.end("same")
            continue
        stop = end_of_group(text, at - 1) if found["body"] else None
        if stop is None:
            # \newcommand\x y is none that pages use, and a group without an end has none behind it either
            if found["body"]:
                return
            continue
        body, at = text[at : stop - 1].strip(), stop
        if found["operator"]:
            yield found["operator"], Macro(f"\\operatorname{found['star']}{{{body}}}"), found.start(), stop
        elif found["def"]:
            yield found["def"], Macro(body, len(found["parameters"]) // 2), found.start(), stop
        elif found["pair"]:
            end = end_of_group(text, stop) if text[stop : stop + 1] == "{" else None
            if end is not None:
                yield found["pair"], Macro(f"{body} #1 {text[stop + 1 : end - 1].strip()}", 1), found.start(), end
                at = end
        else:
            macro = Macro(body, int(found["count"] or 0), found["default"])
            yield found["a"] or found["b"], macro, found.start(), stop


def _configured(value: object) -> Macro | None:
    """A macro of a configuration: its body, or a list of body, number of arguments and default."""
    if isinstance(value, str):
        # KaTeX counts the arguments itself
        return Macro(value, max((int(found[1]) for found in _PLACE.finditer(value)), default=0))
    if isinstance(value, list) and value and isinstance(value[0], str):
        count = value[1] if len(value) > 1 else "0"
        default = value[2] if len(value) > 2 and isinstance(value[2], str) else None
        return Macro(value[0], int(count) if isinstance(count, str) and count in "0123456789" else 0, default)
    return None
