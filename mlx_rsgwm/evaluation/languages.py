"""The words around answers in the languages that people ask in, one table a language; no rules stand here.

Every entry is a regular expression without regard to case. A language without spaces between words (``spaced`` False)
has its words found anywhere; the others' only as whole words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """What one language says. An empty entry: no word of this language is known for it."""

    yes: str = ""
    no: str = ""
    answer: str = ""  # states an answer: "Antwort: 5"
    joins: str = ""  # and, or; not where the word means something else in a larger language (Dutch "of")
    this: str = ""  # "that" of "that is wrong"
    copula: str = ""
    right: str = ""
    wrong: str = ""
    mistake: str = ""  # takes an answer back by itself: "I miscounted"
    pause: str = ""  # takes it back only if a new value follows at once: "wait, 11"
    correction: str = ""  # the same before a colon: "Edit: 11"
    link: str = ""  # small words between a pause and the new value: "wait, it should be 11"
    denial: str = ""  # before a value: "not 5"
    denial_after: str = ""  # after a value
    bound: str = ""  # says how far a value may go: "more than 5"
    range_from: str = ""
    range_to: str = ""
    conclusion: str = ""  # leads from what was given to what comes of it: "so", "altogether"
    spaced: bool = True


LANGUAGES = {
    "English": Language(
        yes="yes|yep|yeah|true|correct",
        no="no|nope",
        joins="and|or",
        this="that|this|it|which|(?:the|my|this|that) (?:first |previous |last )?(?:answer|result|number|value)",
        copula="is|was|seems|looks",
        right="right|correct",
        wrong="wrong|incorrect|mistaken|not (?:right|correct)",
        mistake=(
            r"(?:that|this|it) (?:can(?:['’]t|not| not)|isn['’]t|is not|wasn['’]t|does(?:n['’]t| not) (?:look|seem)) "
            r"(?:be |quite )?(?:right|correct|true)"
            r"|I (?:have )?(?:was (?:wrong|mistaken)|ma(?:d|k)e an? (?:\w+ )?(?:mistake|error)|mis(?:read|counted|"
            r"calculated|took|understood|added)|forgot)|my (?:mistake|bad|error)|an? (?:mistake|error)(?=[:!])"
            r"|(?:actually|wait|hmm+),? I(?:['’]m| am) not (?:sure|certain)(?: (?:that |if |whether )?(?:this|that|it) "
            r"is (?:right|correct))?|let me (?:redo|fix|correct)|(?:scrap|forget|disregard|ignore|scratch|strike) "
            r"(?:that|this)|or rather|make "
            r"that|w?h?oops|sorry|(?:that|it) (?:isn['’]t|is not|can['’]t be)(?=[.!\n]|$)"
        ),
        pause=(
            r"wait(?!\s(?:until|till|for|times?|at|in|to|on)\b)|hmm+|hm|actually|i mean|i meant|not quite|i stand "
            r"corrected|apologies|hold on|hang on|on (?:second|further) thought|on reflection|um+|uh+|rather|"
            r"(?:let me|i (?:should|need to|must)) (?:re-?(?:check|count|compute|calculate|consider|think|do|read|"
            r"examine|evaluate)|double[- ]check|check|correct|fix)[^.:!?\n]{0,30}|i take (?:that|it) back|"
            r"(?:it|that|this) (?:should|must|ought to) (?:have been|be)"
        ),
        correction="correction|error|edit|errat(?:um|a)",
        link=(
            r"it|that|this|so|then|the|my|final|new|correct|right|answer|value|total|result|number|should|must|would|"
            r"will|has|to|be|is|are|was|['’]s|i|get|got|mean|meant|rather|say|make|about|equals|actually|wait|no|"
            r"sorry|on"
        ),
        denial=r"not|\w+n['’]t|cannot|never|neither|nor|rather than|instead of|other than|except|unlike",
        bound=(
            "(?:more|less|fewer|greater|higher|lower|larger|smaller|bigger|longer|shorter) than(?: or equal to)?|"
            "at (?:least|most)|a (?:maximum|minimum) of|under|below|above|(?<!left )over|"
            "(?<!round )(?<!rounded )(?<!rounds )(?<!rounding )(?<!add )(?<!adds )(?<!adding )up to|"
            "no (?:more|less|fewer) than"
        ),
        range_from="from|between",
        range_to="to|and",
        conclusion=(
            "so|thus|hence|therefore|total|altogether|equals?|makes?|making|giving|gives|leaves?|leaving|means?|now|"
            "actually|comes|becomes|then|must|sum|average|in all|instead"
        ),
    ),
    "German": Language(
        yes="ja",
        no="nein",
        answer=r"Antwort(?:\s+(?:ist|lautet|wäre))?|Lösung\s+(?:ist|lautet)",
        joins="und|oder",
        this="das|dies|es",
        copula="ist|war",
        right="richtig|korrekt",
        wrong="falsch|nicht (?:richtig|korrekt|wahr)|verkehrt",
        mistake="(?:habe|hab) mich (?:verrechnet|vertan|geirrt)|stimmt (?:so )?nicht",
        pause="moment|warte|eigentlich|vielmehr|halt|entschuldigung",
        correction="korrektur|berichtigung|fehler",
        link="es|ist|sind|sollte|das|richtig|antwort|die|sein",
        denial="nicht|statt",
        bound="mehr als|weniger als|mindestens|höchstens",
        range_from="von|zwischen",
        range_to="bis|und",
        conclusion="also|insgesamt|damit|zusammen|macht|somit|bleiben|ergibt",
    ),
    "French": Language(
        yes="oui",
        no="non",
        answer=r"réponse(?:\s+(?:finale|correcte))?(?:\s+est)?",
        joins="et|ou",
        this="ce(?:la)?|ça|c['’]",
        copula="est|était",
        right="juste|bonne?|correcte?",
        wrong="faux|fausse|incorrecte?|erron[ée]e?|pas (?:correcte?|juste|bon(?:ne)?|vrai)",
        mistake="me suis trompée?",
        pause="attend(?:s|ez)|en fait|plutôt|pardon|désolée?",
        correction="erreur|corrige",
        link="c['’]est|ce|sont|la|le|réponse",
        denial="pas",
        bound="plus de|moins de|au (?:moins|plus)",
        range_from="de|entre",
        range_to="à|et",
        conclusion="donc|soit|total|reste|restent|ainsi",
    ),
    "Spanish": Language(
        yes="sí",
        no="no",
        answer=r"respuesta(?:\s+(?:final|correcta))?(?:\s+es)?",
        joins="y|e|o",
        this="eso|esto",
        copula="es|era|está|estaba",
        right="correct[oa]",
        wrong="incorrect[oa]|falso|erróne[oa]",
        mistake="me (?:equivoqué|he equivocado|confundí)|no (?:es|está) correct[oa]",
        pause="espera|perdón|en realidad|mejor dicho|lo siento|corrijo",
        correction="corrección",
        link="es|son|serían?|respuesta|perdón",
        denial=r"no (?:es|son)|(?<=,\s)no",
        bound="más de|menos de|al menos",
        range_from="de|entre",
        range_to="a|y",
        conclusion="así que|total|quedan|entonces|por lo tanto|o sea",
    ),
    "Italian": Language(
        yes="sì",
        no="no",
        answer=r"risposta(?:\s+(?:finale|corretta|giusta))?(?:\s+è)?",
        joins="e|o",
        this="questo",
        copula="è|era",
        right="giust[oa]|corrett[oa]|cert[oa]",
        wrong="sbagliat[oa]|errat[oa]|falso",
        mistake="(?:ho|mi sono) sbagliato|non è (?:corrett[oa]|giust[oa])",
        pause="aspetta|anzi|in realtà|scus[ai]|scusate",
        correction="correzione",
        link="sono|è|risposta|la",
        denial="non(?: (?:è|sono))?",
        bound="più di|meno di|almeno",
        range_from="da|tra|fra",
        range_to="a|e",
        conclusion="quindi|totale|restano|cioè",
    ),
    "Portuguese": Language(
        yes="sim",
        no="não",
        answer=r"resposta(?:\s+(?:final|correta))?(?:\s+é)?",
        joins="e|ou",
        this="isso",
        copula="é|está|era",
        right="corret[oa]|cert[oa]",
        wrong="errad[oa]|incorret[oa]",
        mistake="me enganei|errei|não (?:é|está) (?:corret[oa]|cert[oa])",
        pause="espere?|na verdade|aliás|desculpe?",
        correction="correção",
        link="é|são|resposta",
        denial="não (?:é|são)",
        bound="mais de|menos de|pelo menos",
        range_from="de|entre",
        range_to="a|e",
        conclusion="então|total|portanto|ou seja",
    ),
    "Dutch": Language(
        yes="ja",
        no="nee",
        answer=r"antwoord(?:\s+is)?",
        this="dat",
        copula="is|was",
        right="juist|goed",
        wrong="fout|onjuist|niet (?:juist|goed|correct)",
        mistake="heb me vergist|klopt (?:zo )?niet",
        pause="wacht|eigenlijk",
        correction="correctie",
        link="het|antwoord|zijn",
        denial="niet",
        bound="meer dan|minder dan|minstens",
        range_from="van|tussen",
        range_to="tot|en",
        conclusion="dus|totaal|samen",
    ),
    "Swedish": Language(
        yes="ja",
        no="nej",
        answer=r"svar(?:et)?(?:\s+(?:är|er))?",
        joins="och|eller",
        this="det",
        copula="är|var",
        right="rätt",
        wrong="fel",
        pause="vänta",
        link="det|är|svaret",
        denial="inte",
        bound="mer än|mindre än|minst",
        range_from="från|mellan",
        range_to="till|och",
        conclusion="så|totalt|alltså",
    ),
    "Finnish": Language(answer=r"vastaus(?:\s+on)?", joins="ja|tai"),
    "Polish": Language(
        yes="tak",
        no="nie",
        answer=r"odpowiedź(?:\s+to)?",
        joins="i|lub",
        copula="to",
        wrong="błędn[ea]",
        pause="chwila",
        correction="korekta",
        denial="nie",
        bound="więcej niż|mniej niż",
        conclusion="więc|razem|czyli",
    ),
    "Turkish": Language(
        yes="evet",
        no="hayır",
        answer="cevap",
        joins="ve|veya",
        wrong="yanlış",
        denial_after="değil",
        conclusion="toplam|yani",
    ),
    "Russian": Language(
        yes="да",
        no="нет",
        answer="ответ",
        joins="и|или",
        this="это",
        right="верно|правильно",
        wrong="неверно|неправильно|ошибка",
        mistake=r"я ошиб\w+|(?:это )?не так",
        pause="подожди(?:те)?|точнее|вернее|стоп|извините|ой",
        correction="исправление|поправка",
        link="это|ответ|будет",
        denial="не",
        bound="более|менее|больше|меньше",
        range_from="от|между",
        range_to="до|и",
        conclusion="значит|итого|всего|поэтому",
    ),
    "Arabic": Language(yes="نعم", no="لا", answer="الإجابة|الجواب", joins="أو", conclusion="إذن|المجموع", spaced=False),
    "Hindi": Language(
        yes="हाँ", no="नहीं", answer="उत्तर", joins="या", denial_after="नहीं", conclusion="कुल|इसलिए", spaced=False
    ),
    "Chinese": Language(
        yes="是的?|对",
        no="不是|否|不对",
        answer="答案",
        joins="和|或",
        mistake="不对|不對|不正确|算错|算錯|错了|錯了",
        pause="等等|等一下|其实|其實",
        correction="更正",
        link="应该是|应为|應該是|答案是|是",
        denial="不是",
        bound="至少|最多|超过|少于",
        conclusion="所以|一共|总共|因此|还剩",
        spaced=False,
    ),
    "Japanese": Language(
        yes="はい",
        no="いいえ",
        answer="答え",
        mistake="間違え|間違い|違います",
        denial_after="では?なく|じゃなく",
        pause="待って|いや",
        correction="訂正",
        link="正解は",
        bound="以上|以下",
        conclusion="合計|だから|つまり",
        spaced=False,
    ),
    "Korean": Language(
        yes="네|예",
        no="아니(?:요|다)?",
        answer="정답은?|답",
        joins="또는",
        mistake="틀렸|잘못",
        denial_after="[가-힣]? ?아니[라고]",
        pause="잠깐",
        correction="정정",
        conclusion="총|따라서|모두",
        spaced=False,
    ),
}


def words(entry: str, spaced: bool | None = None) -> str:
    """The alternatives of one entry over all languages, or over those with or without spaces between words."""
    languages = [language for language in LANGUAGES.values() if spaced in (None, language.spaced)]
    return "|".join(getattr(language, entry) for language in languages if getattr(language, entry))
