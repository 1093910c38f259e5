"""Languages: hand-written sentences, real texts, and what is shown to the model."""

import csv
import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alloy.data.language import SAMPLE_CHARS, UNKNOWN, LanguageIdentifier, sample
from alloy.data.prose import prose, split_math, windows
from alloy.errors import CheckpointError

# fmt: off
SENTENCES = {
    "en": "The train was late this morning, so we waited on the platform and drank our coffee.",
    "de": "Der Zug hatte heute Morgen Verspätung, deshalb warteten wir auf dem Bahnsteig und tranken Kaffee.",
    "fr": "Le train était en retard ce matin, alors nous avons attendu sur le quai en buvant notre café.",
    "es": "El tren llegó tarde esta mañana, así que esperamos en el andén y tomamos nuestro café.",
    "it": "Questa mattina il treno era in ritardo, perciò abbiamo aspettato sul binario bevendo il nostro caffè.",
    "pt": "O trem estava atrasado esta manhã, então esperamos na plataforma e não tomamos o nosso café.",
    "nl": "De trein had vanmorgen vertraging, dus wachtten wij op het perron en dronken onze koffie.",
    "pl": "Pociąg spóźnił się dziś rano, więc czekaliśmy na peronie i piliśmy naszą kawę.",
    "cs": "Vlak měl dnes ráno zpoždění, a tak jsme čekali na nástupišti a pili svou kávu.",
    "sv": "Tåget var försenat i morse, så vi väntade på perrongen och drack vårt kaffe.",
    "fi": "Juna oli tänä aamuna myöhässä, joten odotimme laiturilla ja joimme kahvimme.",
    "hu": "A vonat ma reggel késett, ezért a peronon vártunk, és megittuk a kávénkat.",
    "tr": "Tren bu sabah gecikti, bu yüzden peronda bekledik ve kahvemizi içtik.",
    "ru": "Сегодня утром поезд опоздал, поэтому мы ждали на платформе и пили кофе.",
    "el": "Το τρένο άργησε σήμερα το πρωί, γι' αυτό περιμέναμε στην αποβάθρα και ήπιαμε τον καφέ μας.",
    "he": "הרכבת איחרה הבוקר, ולכן חיכינו על הרציף ושתינו את הקפה שלנו.",
    "fa": "قطار امروز صبح دیر رسید، برای همین روی سکو منتظر ماندیم و قهوه‌مان را نوشیدیم.",
    "hi": "आज सुबह ट्रेन देर से आई, इसलिए हमने प्लेटफ़ॉर्म पर इंतज़ार किया और अपनी कॉफ़ी पी।",
    "ja": "今朝は電車が遅れたので、私たちはホームで待ちながらコーヒーを飲みました。",
    "zh": "今天早上火车晚点了，所以我们在站台上一边等一边喝咖啡。",
    "ko": "오늘 아침 기차가 늦어서 우리는 승강장에서 기다리며 커피를 마셨습니다.",
}
# fmt: on


@pytest.fixture(scope="module")
def identifier() -> LanguageIdentifier:
    """The default one."""
    return LanguageIdentifier()


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences_are_told(identifier: LanguageIdentifier, code: str) -> None:
    """One sentence of each of 21 languages; the probability is one."""
    found, score = identifier.identify(SENTENCES[code])
    assert found == code
    assert 0 < score <= 1


def test_math_and_code_do_not_change_the_language(identifier: LanguageIdentifier) -> None:
    """A French page whose letters are mostly formulas, English code, a table and addresses."""
    code = "```python\nfor line in the_whole_file: print('this is the end of the line', line)\n```\n" * 20
    noise = r"$\operatorname{this} \text{ is the probability that the event happens}$ https://example.org/the-and-of "
    text = code + (SENTENCES["fr"] + noise * 10 + "\n| the | and | of |\n") * 3
    assert identifier.identify(text)[0] == "fr"
    assert "the" not in prose(text).split()


@pytest.mark.parametrize("text", ["", " \n", "$x^2$", "```\nfor x in range(3):\n```", "12 + 7", "ab"])
def test_texts_without_prose_have_no_language(identifier: LanguageIdentifier, text: str) -> None:
    """Nothing is guessed from nothing."""
    assert identifier.identify(text) == UNKNOWN


def test_long_texts_are_sampled_in_several_places() -> None:
    """Start and end are menus and footers; a bounded piece of each third is shown."""
    text = " ".join(f"{part}{number}" for part in "abc" for number in range(5000))
    shown = sample(text)
    assert len(shown) <= SAMPLE_CHARS + 2
    assert {word[0] for word in shown.split() if word[:1].isalpha()} == set("abc")


def test_threads_agree(identifier: LanguageIdentifier) -> None:
    """One identifier in four threads says what it says in one."""
    texts = list(SENTENCES.values()) * 5
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(identifier.identify, texts)) == [identifier.identify(text) for text in texts]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """The file that is not there stands in the message."""
    with pytest.raises(CheckpointError, match=r"lid\.176\.bin: no such file"):
        LanguageIdentifier(tmp_path / "lid.176.bin")


def test_fasttext_models_are_read(tmp_path: Path) -> None:
    """A model trained here on two languages tells them apart."""
    fasttext = pytest.importorskip("fasttext")
    lines = [f"__label__{code} {word}" for code in ("fr", "fi") for word in SENTENCES[code].lower().split() * 20]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), minn=2, maxn=4, epoch=20, verbose=0, thread=1)
    model.save_model(str(tmp_path / "lid.bin"))
    identifier = LanguageIdentifier(tmp_path / "lid.bin")
    for code in ("fr", "fi"):
        found, score = identifier.identify(SENTENCES[code] + "\n\n" + SENTENCES[code])
        assert found == code
        assert 0.5 < score <= 1


def test_real_texts_are_told(identifier: LanguageIdentifier) -> None:
    """Persian questions and English news and reviews; short Persian rows are where errors would be."""
    folder = os.environ.get("ALLOY_TEST_DATA")
    if not folder:
        pytest.skip("ALLOY_TEST_DATA is not set")
    with gzip.open(Path(folder) / "parsinlu/entailment/dev.csv.gz", "rt", encoding="utf-8") as file:
        persian = [row["sent1"] for row in csv.DictReader(file)]
    with gzip.open(Path(folder) / "text/bbc-test.jsonl.gz") as file:
        english = [json.loads(line)["text"] for line in file]
    assert sum(identifier.identify(text)[0] == "fa" for text in persian) >= 0.97 * len(persian)
    told = [identifier.identify(text) for text in english]
    assert all(code == "en" and score > 0.65 for code, score in told)


@pytest.mark.parametrize(
    ("text", "rest", "formulas"),
    [
        (r"costs \$5 and \$6", "costs $5 and $6", []),
        ("from $5 to $10 a day", "from $5 to $10 a day", []),
        ("let $x$ be $y_1$.", "let   be  .", ["x", "y_1"]),
        ("$$a\nb$$ then \\[c\\\\[2pt]d\\] \\(e\\)", "  then    ", ["a\nb", "c\\\\[2pt]d", "e"]),
        ("\\begin{align*}a&=b\\end{align*}!", " !", ["a&=b"]),
        ("open $ and $$ end", "open $ and $$ end", []),
    ],
)
def test_formulas_are_taken_out(text: str, rest: str, formulas: list[str]) -> None:
    """By hand."""
    assert split_math(text) == (rest, formulas)


def test_windows_by_hand() -> None:
    """One in the middle, three in the middles of the thirds, all of a short text."""
    assert windows("0123456789", 1, 4) == ["3456"]
    assert windows("abcdefghi", 3, 3) == ["b", "e", "h"]
    assert windows("abc", 3, 5) == ["abc"]
