"""The language of a text, and its limits."""

import pytest

from jaxrlhf.rewards.language import language, same_language, script

SENTENCES = {
    "en": ["The cat sat on the mat and looked at me.", "Why is the sky blue?", "I do not know what you mean by that."],
    "de": ["Die Katze liegt auf dem Sofa und schläft.", "Warum ist der Himmel blau?", "Ich weiß nicht, was du meinst."],
    "fr": [
        "Le chat est sur la table et il dort.",
        "Pourquoi le ciel est-il bleu ?",
        "Je ne sais pas ce que vous dites.",
    ],
    "es": [
        "El gato está en la mesa y no se mueve.",
        "¿Por qué el cielo es azul?",
        "No sé lo que quieres decir con eso.",
    ],
    "it": ["Il gatto è sul tavolo e non si muove.", "Perché il cielo è blu?", "Non so che cosa vuoi dire con questo."],
    "pt": ["O gato não está na mesa e não quer comer.", "Por que o céu é azul?", "Eu não sei o que você quer dizer."],
    "nl": ["De kat zit op de mat en kijkt naar het raam.", "Waarom is de lucht blauw?", "Ik weet niet wat je bedoelt."],
    "cyrillic": ["Почему небо голубое?"],
    "greek": ["Γιατί λάμπει το φεγγάρι;"],
    "arabic": ["لماذا السماء زرقاء؟"],
    "hebrew": ["למה השמיים כחולים?"],
    "devanagari": ["आसमान नीला क्यों है?"],
    "thai": ["ทำไมท้องฟ้าเป็นสีฟ้า"],
    "chinese": ["天空为什么是蓝色的"],
    "japanese": ["空はなぜ青いのですか"],
    "korean": ["하늘은 왜 파란색인가요?"],
}


@pytest.mark.parametrize("name", SENTENCES)
def test_languages(name):
    assert [language(text) for text in SENTENCES[name]] == [name] * len(SENTENCES[name])


def test_same_and_other():
    names = list(SENTENCES)
    for a in names:
        for b in names:
            assert same_language([SENTENCES[a][0]], [SENTENCES[b][0]]) == [float(a == b)], (a, b)


def test_undetected_languages_are_unscored():
    english, german, russian = (SENTENCES[name][0] for name in ("en", "de", "cyrillic"))
    unknown = "Tere hommikust, sõbrad, kuidas läheb"  # Estonian
    assert language(unknown) == "latin"
    assert language("42 + 7 = ?") is script("!!") is None
    assert same_language([english, english, unknown, ""], [unknown, "42", unknown, german]) == [None] * 4
    assert same_language([unknown], [russian]) == same_language([russian], [unknown]) == [0]
    assert language("水") == "chinese"
    assert script("The word 天空 means sky") == "latin"
