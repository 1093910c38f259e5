"""Bytes of a page to text: which encoding it is in, and its characters.

Order: byte order mark, `charset` of the HTTP header, `<meta>` in the first 4 KiB, XML declaration, detection. A declared
encoding that turns more than 0.5 % of the characters into U+FFFD is overruled by detection; so is every declaration of bytes
whose NULs show UTF-16. Labels are read as browsers do: https://encoding.spec.whatwg.org/#names-and-labels, and a meta element
is looked for as in https://html.spec.whatwg.org/#prescan-a-byte-stream-to-determine-its-encoding.
"""

import codecs
import contextlib
import functools
import re
from dataclasses import dataclass
from typing import Literal

from alloy.core.device import require

Source = Literal["bom", "header", "meta", "detected", "default"]

PRESCAN_BYTES = 4096
MOST_REPLACED = 0.005

# encoding of the standard -> Python's codec, and its labels besides the name; "replacement" stands for encodings that
# browsers refuse
_LABELS = {
    "utf-8": ("utf_8", "unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf8 x-unicode20utf8"),
    "ibm866": ("cp866", "866 cp866 csibm866"),
    "iso-8859-2": (
        "iso8859_2",
        "csisolatin2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2",
    ),
    "iso-8859-3": (
        "iso8859_3",
        "csisolatin3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3",
    ),
    "iso-8859-4": (
        "iso8859_4",
        "csisolatin4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4",
    ),
    "iso-8859-5": (
        "iso8859_5",
        "csisolatincyrillic cyrillic iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988",
    ),
    "iso-8859-6": (
        "iso8859_6",
        "arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6-e iso-8859-6-i iso-ir-127 "
        "iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987",
    ),
    "iso-8859-7": (
        "iso8859_7",
        "csisolatingreek ecma-118 elot_928 greek greek8 iso-ir-126 iso8859-7 iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek",
    ),
    "iso-8859-8": (
        "iso8859_8",
        "csiso88598e csisolatinhebrew hebrew iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8 iso_8859-8:1988 visual",
    ),
    "iso-8859-8-i": ("iso8859_8", "csiso88598i logical"),
    "iso-8859-10": ("iso8859_10", "csisolatin6 iso-ir-157 iso8859-10 iso885910 l6 latin6"),
    "iso-8859-13": ("iso8859_13", "iso8859-13 iso885913"),
    "iso-8859-14": ("iso8859_14", "iso8859-14 iso885914"),
    "iso-8859-15": ("iso8859_15", "csisolatin9 iso8859-15 iso885915 iso_8859-15 l9"),
    "iso-8859-16": ("iso8859_16", ""),
    "koi8-r": ("koi8_r", "cskoi8r koi koi8 koi8_r"),
    "koi8-u": ("koi8_u", "koi8-ru"),
    "macintosh": ("mac_roman", "csmacintosh mac x-mac-roman"),
    "windows-874": ("cp874", "dos-874 iso-8859-11 iso8859-11 iso885911 tis-620"),
    "windows-1250": ("cp1250", "cp1250 x-cp1250"),
    "windows-1251": ("cp1251", "cp1251 x-cp1251"),
    "windows-1252": (
        "cp1252",
        "ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 iso88591 iso_8859-1 "
        "iso_8859-1:1987 l1 latin1 us-ascii x-cp1252",
    ),
    "windows-1253": ("cp1253", "cp1253 x-cp1253"),
    "windows-1254": (
        "cp1254",
        "cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5 x-cp1254",
    ),
    "windows-1255": ("cp1255", "cp1255 x-cp1255"),
    "windows-1256": ("cp1256", "cp1256 x-cp1256"),
    "windows-1257": ("cp1257", "cp1257 x-cp1257"),
    "windows-1258": ("cp1258", "cp1258 x-cp1258"),
    "x-mac-cyrillic": ("mac_cyrillic", "x-mac-ukrainian"),
    # one decoder in the standard, too
    "gb18030": ("gb18030", "chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk"),
    "big5": ("big5hkscs", "big5-hkscs cn-big5 csbig5 x-x-big5"),
    "euc-jp": ("euc_jp", "cseucpkdfmtjapanese x-euc-jp"),
    "iso-2022-jp": ("iso2022_jp", "csiso2022jp"),
    "shift_jis": ("cp932", "csshiftjis ms932 ms_kanji shift-jis sjis windows-31j x-sjis"),
    "euc-kr": (
        "cp949",
        "cseuckr csksc56011987 iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949",
    ),
    "replacement": ("", "csiso2022kr hz-gb-2312 iso-2022-cn iso-2022-cn-ext iso-2022-kr"),
    "utf-16be": ("utf_16_be", "unicodefffe"),
    "utf-16le": ("utf_16_le", "csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16"),
    "x-user-defined": ("", ""),
}
_ENCODINGS = {label: name for name, (_, labels) in _LABELS.items() for label in (name, *labels.split())}
# where Python's tables and those of the standard differ
_PATCHES = {"koi8-u": {0xAE: "ў", 0xBE: "Ў"}, "windows-1255": {0xCA: "\u05ba"}}
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16be"), (codecs.BOM_UTF16_LE, "utf-16le"))

_CHARSET = re.compile(r"""charset[\t\n\f\r ]*=[\t\n\f\r ]*(?:"([^"]*)"|'([^']*)'|([^\t\n\f\r ;"']+))""", re.I)
_XML = re.compile(rb"""\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([A-Za-z][A-Za-z0-9._:-]*)["']""")
_MARKUP = re.compile(rb"<!--|<meta(?=[\t\n\f\r /])|</?[a-z]|<[!/?]", re.I)
_ATTRIBUTE = re.compile(
    rb"[\t\n\f\r /]*([^\t\n\f\r />][^\t\n\f\r />=]*)"
    rb"""(?:[\t\n\f\r ]*=[\t\n\f\r ]*(?:"([^"]*)"|'([^']*)'|([^\t\n\f\r >"'][^\t\n\f\r >]*)?))?"""
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A page's text, the encoding (its WHATWG name, in lower case), what told it, and a declared one that was overruled."""

    text: str
    encoding: str
    source: Source
    overruled: str = ""


def decode(body: bytes, content_type: str = "") -> Decoded:
    """The text of a page; never fails, what cannot be decoded becomes U+FFFD.

    Args:
        body: the page as served, after content-decoding
        content_type: value of the HTTP header Content-Type, or ""
    """
    for mark, name in _BOMS:
        if body.startswith(mark):
            return Decoded(decode_as(body[len(mark) :], name), name, "bom")
    name, source = _declared(body, content_type)
    wide = _wide(body)
    if wide:
        overruled = "" if name in ("", "utf-16le", wide) else name
        kept = source if name == wide else "detected"
        return Decoded(decode_as(body, wide), wide, kept, overruled)
    if not name:
        return _detected(body)
    text = decode_as(body, name)
    lost = _replaced(text, body)
    if lost <= MOST_REPLACED * len(text):
        return Decoded(text, name, source)
    other = _detected(body)
    if other.encoding == name or _replaced(other.text, body) >= lost:
        return Decoded(text, name, source)
    return Decoded(other.text, other.encoding, "detected", name)


def find_encoding(label: str) -> str:
    """The WHATWG name of an encoding label, "" for one that no browser knows; "gbk" reads as gb18030, which contains it."""
    return _ENCODINGS.get(label.strip("\t\n\f\r ").lower(), "")


def decode_as(body: bytes, encoding: str) -> str:
    """The text in an encoding of `find_encoding`, U+FFFD for what is none."""
    if encoding == "replacement":
        return "\ufffd" if body else ""
    codec = _LABELS[encoding][0]
    if encoding == "x-user-defined" or codec.startswith(("cp12", "iso8859", "koi8", "mac", "cp874", "cp866")):
        if body.isascii():
            return body.decode("ascii")
        # a table may be a string, too, which the stub leaves out
        return codecs.charmap_decode(body, "replace", _table(encoding))[0]  # type: ignore[arg-type]
    return body.decode(codec, "replace")


@functools.cache
def _table(encoding: str) -> str:
    """The characters of the 256 bytes; Windows code pages give C1 controls where they define nothing."""
    if encoding == "x-user-defined":
        return "".join(chr(byte if byte < 0x80 else 0xF700 + byte) for byte in range(256))
    codec = _LABELS[encoding][0]
    characters = [bytes([byte]).decode(codec, "replace") for byte in range(256)]
    if encoding.startswith("windows"):
        characters = [chr(b) if c == "\ufffd" and b < 0xA0 else c for b, c in enumerate(characters)]
    for byte, character in _PATCHES.get(encoding, {}).items():
        characters[byte] = character
    return "".join(characters)


def _declared(body: bytes, content_type: str) -> tuple[str, Source]:
    """What header, meta element or XML declaration say; "" if none says anything known."""
    match = _CHARSET.search(content_type)
    name = find_encoding(match[1] or match[2] or match[3] or "") if match else ""
    if name:
        return name, "header"
    head = body[:PRESCAN_BYTES]
    name = _prescan(head)
    if not name and (xml := _XML.match(head)):
        name = find_encoding(xml[1].decode("ascii"))
    # bytes in which a declaration could be read are not UTF-16
    name = {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}.get(name, name)
    return name, "meta"


def _prescan(head: bytes) -> str:
    """The encoding that a meta element gives, comments and values of other elements' attributes left aside."""
    place = 0
    while match := _MARKUP.search(head, place):
        place = match.end()
        kind = match[0].lower()
        if kind == b"<!--":
            # <!--> is a whole comment
            end = head.find(b"-->", place - 2)
            if end < 0:
                return ""
            place = end + 3
        elif kind == b"<meta":
            attributes, place = _attributes(head, place)
            name = _meta(attributes)
            if name:
                return name
        elif len(kind) == 2 and not kind[1:].isalpha():
            end = head.find(b">", place)
            if end < 0:
                return ""
            place = end + 1
        else:
            while place < len(head) and head[place] not in b"\t\n\f\r >":
                place += 1
            _, place = _attributes(head, place)
    return ""


def _attributes(head: bytes, place: int) -> tuple[dict[str, str], int]:
    """Attributes of a tag from `place` on, the first of each name, and where they end."""
    found: dict[str, str] = {}
    while match := _ATTRIBUTE.match(head, place):
        place = match.end()
        value = match[2] or match[3] or match[4] or b""
        found.setdefault(match[1].decode("latin-1").lower(), value.decode("latin-1"))
    return found, place


def _meta(attributes: dict[str, str]) -> str:
    if "charset" in attributes:
        return find_encoding(attributes["charset"])
    if attributes.get("http-equiv", "").lower() != "content-type":
        return ""
    match = _CHARSET.search(attributes.get("content", ""))
    return find_encoding(match[1] or match[2] or match[3] or "") if match else ""


def _wide(body: bytes) -> str:
    """The UTF-16 that bytes without a mark are in: markup is ASCII, so that every other byte of its beginning is NUL."""
    head = body[:PRESCAN_BYTES]
    pairs = len(head) // 2
    if head.count(0) < max(2, pairs * 0.3):
        return ""
    first, second = head[: 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if second >= 0.3 * pairs and first <= 0.05 * pairs:
        return "utf-16le"
    return "utf-16be" if first >= 0.3 * pairs and second <= 0.05 * pairs else ""


def _detected(body: bytes) -> Decoded:
    ascii_only = body.isascii()
    # escape sequences in ASCII may be ISO-2022-JP
    if not (ascii_only and b"\x1b$" in body):
        with contextlib.suppress(UnicodeDecodeError):
            return Decoded(body.decode("utf-8"), "utf-8", "default" if ascii_only else "detected")
    encoding = require("resiliparse.parse.encoding", extra="data", why="pages without a charset are read")
    guess = _of_codec(encoding.detect_encoding(body) or "")
    name = guess or "windows-1252"
    return Decoded(decode_as(body, name), name, "detected" if guess else "default")


@functools.cache
def _of_codec(name: str) -> str:
    """The encoding whose codec the detector named."""
    if found := find_encoding(name):
        return found
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        return ""
    names = (n for n, (c, _) in _LABELS.items() if c and codecs.lookup(c).name == codec)
    return next(names, find_encoding(codec.replace("_", "-")))


def _replaced(text: str, body: bytes) -> int:
    """Characters that decoding lost; those that the page itself holds as U+FFFD do not count."""
    # nearly always there is none, which is quickly seen
    return max(0, text.count("\ufffd") - body.count(b"\xef\xbf\xbd")) if "\ufffd" in text else 0
