"""Encodings of pages, against webencodings' table, Python's codecs and cases worked out by hand."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webencodings.labels import LABELS

from alloy.data.web.decode import decode, decode_as, find_encoding

RUSSIAN = "<p>Уравнение с одной неизвестной: найдите корень и проверьте ответ подстановкой.</p>"


def test_labels_are_those_of_browsers() -> None:
    """Every label means what webencodings says; gbk alone is read as gb18030, whose decoder the standard gives it."""
    for label, name in LABELS.items():
        assert find_encoding(f" {label.upper()}\n") == {"gbk": "gb18030"}.get(name, name)
    assert find_encoding("utf-7") == find_encoding("") == find_encoding("latin-1-x") == ""


@pytest.mark.parametrize("name", sorted({n for n in LABELS.values() if n not in ("replacement", "x-user-defined")}))
def test_text_of_each_encoding_comes_back(name: str) -> None:
    """What Python's codec of that encoding writes is read again, for every character it has below U+0600.

    Python's codecs for Chinese and Japanese differ from browsers in letters of other scripts, so they are asked for their own.
    """
    codec = {
        "iso-8859-8-i": "iso8859_8",
        "windows-874": "cp874",
        "x-mac-cyrillic": "mac_cyrillic",
        "macintosh": "mac_roman",
    }
    kept = ""
    for code in (*range(32, 127), *range(160, 0x600)):
        try:
            kept += chr(code) if chr(code).encode(codec.get(name, name)) else ""
        except UnicodeEncodeError:
            continue
    japanese = dict.fromkeys(("iso-2022-jp", "shift_jis", "euc-jp"), "abc日本語のテキスト")
    kept = {"big5": "abc數學與程式", **japanese}.get(name, kept)
    body = kept.encode(codec.get(name, name))
    assert decode_as(body, find_encoding(name)) == kept


@pytest.mark.parametrize(
    ("body", "encoding", "text"),
    [
        (b"\x81\x8d\x8f\x90\x9d\x80", "windows-1252", "\x81\x8d\x8f\x90\x9d€"),
        (b"\xaa\x81", "windows-1253", "\ufffd\x81"),
        (b"\xa5\xff", "iso-8859-3", "\ufffd˙"),
        (b"\xae\xbe", "koi8-u", "ўЎ"),
        (b"a\x80\xff", "x-user-defined", "a\uf780\uf7ff"),
        (b"<p>anything", "replacement", "\ufffd"),
        (b"\x87\x40", "shift_jis", "①"),
        (b"\xc3", "utf-8", "\ufffd"),
    ],
)
def test_tables_of_the_standard(body: bytes, encoding: str, text: str) -> None:
    """Undefined bytes are C1 controls in Windows code pages and U+FFFD elsewhere; by the standard's index files."""
    assert decode_as(body, encoding) == text


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "source"),
    [
        (b"\xef\xbb\xbfa", "text/html; charset=koi8-r", "utf-8", "bom"),
        (b"\xff\xfea\x00", "text/html; charset=utf-8", "utf-16le", "bom"),
        (b"\xfe\xff\x00a", "", "utf-16be", "bom"),
        (b'<meta charset="utf-8">\xe9', 'text/html; charset="ISO-8859-1"', "windows-1252", "header"),
        (b"<meta charset=koi8-r>\xc1", "text/html", "koi8-r", "meta"),
        (b"<META\nname=x charset='windows-1251'/>\xe0", "text/html; charset=", "windows-1251", "meta"),
        (b'<meta http-equiv=Content-Type content="text/html; charset=gbk">\xc4\xe3', "", "gb18030", "meta"),
        (b'<meta content="text/html; charset=gbk">\xc3\xa9', "", "utf-8", "detected"),
        (b"<!-- <meta charset=koi8-r> --><meta charset=big5>\xa4\xa4", "", "big5", "meta"),
        (b'<a title="<meta charset=koi8-r>"><meta charset=big5>\xa4\xa4', "", "big5", "meta"),
        (b"<!--><meta charset=koi8-r>\xc1", "", "koi8-r", "meta"),
        (b"<meta charset=nonsense><meta charset=koi8-r>\xc1", "", "koi8-r", "meta"),
        (b"<meta charset=utf-16>\xc3\xa9", "", "utf-8", "meta"),
        (b"<meta charset=x-user-defined>\xe9", "", "windows-1252", "meta"),
        (b"<?xml version='1.0' encoding='koi8-r'?><p>\xc1", "", "koi8-r", "meta"),
        (b" " * 4090 + b"<meta charset=koi8-r>\xc3\xa9", "", "utf-8", "detected"),
        (b"plain", "", "utf-8", "default"),
        (b"", "", "utf-8", "default"),
        ("<p>日本語のページです".encode("iso2022_jp"), "", "iso-2022-jp", "detected"),
    ],
)
def test_order_of_sources(body: bytes, content_type: str, encoding: str, source: str) -> None:
    """BOM, header, meta, XML declaration, detection, each only where those before say nothing."""
    page = decode(body, content_type)
    assert (page.encoding, page.source, page.overruled) == (encoding, source, "")


@pytest.mark.parametrize("codec", ["cp1251", "koi8_r", "utf_8"])
@pytest.mark.parametrize("label", ["utf-8", "euc-kr", "iso-2022-jp", "replacement"])
def test_wrong_header_is_overruled(codec: str, label: str) -> None:
    """A header that loses more than 0.5 % of the characters gives way, and is named; a right one stands."""
    page = decode((RUSSIAN * 9).encode(codec), f"text/html; charset={label}")
    assert page.text == RUSSIAN * 9
    right = (codec, label) == ("utf_8", "utf-8")
    assert (page.source, page.overruled) == (("header", "") if right else ("detected", label))


def test_a_few_bad_bytes_do_not_overrule() -> None:
    """One bad byte in 400 characters stays one U+FFFD; those that the page itself has do not count."""
    page = decode(b"<p>caf\xc3\xa9 " * 50 + b"\xe9", "text/html; charset=utf-8")
    assert (page.encoding, page.source, page.text[-1]) == ("utf-8", "header", "\ufffd")
    page = decode("\ufffd\ufffd\ufffd".encode(), "text/html; charset=utf-8")
    assert (page.text, page.source) == ("\ufffd\ufffd\ufffd", "header")


@pytest.mark.parametrize("end", ["le", "be"])
def test_utf_16_without_a_mark(end: str) -> None:
    """Is seen by its NULs, whatever the header says."""
    body = RUSSIAN.encode(f"utf-16-{end}")
    html = f"<html><head><title>x</title></head>{RUSSIAN}</html>"
    page = decode(html.encode(f"utf-16-{end}"), "text/html; charset=utf-8")
    assert (page.text, page.encoding, page.source, page.overruled) == (html, f"utf-16{end}", "detected", "utf-8")
    page = decode(body, f"text/html; charset=utf-16{end}")
    assert (page.text, page.source) == (RUSSIAN, "header")


def test_nul_bytes_stay() -> None:
    """NULs end nothing and change no encoding."""
    page = decode(b"<p>a\x00b\x00</p>caf\xc3\xa9", "text/html; charset=utf-8")
    assert page.text == "<p>a\x00b\x00</p>café"


@given(
    st.binary(max_size=300),
    st.sampled_from(["", "text/html; charset=utf-8", "x; charset=gb2312", "; charset=iso-2022-jp"]),
)
def test_never_fails(body: bytes, content_type: str) -> None:
    """Any bytes give text that can be stored as UTF-8."""
    decode(b"<meta " + body, content_type)
    decode(body, content_type).text.encode("utf-8")


@pytest.mark.skipif(not os.environ.get("ALLOY_TEST_DATA"), reason="ALLOY_TEST_DATA is not set")
def test_page_with_its_charset_in_the_header_alone() -> None:
    """The Latin-1 copy reads as the UTF-8 original."""
    folder = Path(os.environ["ALLOY_TEST_DATA"]) / "math-pages" / "pages"
    page = decode((folder / "latin1-giac-khicas.html").read_bytes(), "text/html; charset=ISO-8859-1")
    assert (page.encoding, page.source) == ("windows-1252", "header")
    assert "é" in page.text
    assert "\ufffd" not in page.text
