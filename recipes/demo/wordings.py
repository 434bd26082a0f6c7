"""Owns the wordings: how each kind of fact is asked, answered and stated in each language.

A wording is a template over the slots of a fact. The last wording of every kind and language, and
the last of the frames that the describing kinds share, are held out: training never sees them.
Order matters, since a wording's number is its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from recipes.demo.facts import Fact

__all__ = [
    "BRIEF_SYSTEMS",
    "PLAIN_SYSTEMS",
    "SMALL_TALK",
    "UNKNOWN_ANSWERS",
    "UNKNOWN_QUESTIONS",
    "Wording",
    "answers",
    "brief_answer",
    "openers",
    "statements",
    "thought",
    "wordings",
]


@dataclass(frozen=True)
class Wording:
    """One question template; ``held_out`` wordings appear in the exam only."""

    name: str
    template: str
    held_out: bool

    def ask(self, fact: Fact, language: str) -> str:
        """Return the question about ``fact``."""
        return self.template.format_map(fact.local[language].slots)


# Questions that fit every kind whose facts are descriptions ("the capital of France").
_FRAMES: Final = {
    "en": """
        {What} is {d}?
        Tell me {what} {d} is.
        Please name {d}.
        Do you know {d}?
        Can you tell me {what} {d} is?
        I would like to know {what} {d} is.
        {D}?
        Give me {d}.
        Could you tell me {what} {d} is?
        Help me: {what} is {d}?
        I need {d}.
        Could you name {d} for me?
    """,
    "de": """
        {What} ist {d}?
        Sag mir, {what} {d} ist.
        Nenne mir bitte {da}.
        Kennst du {da}?
        Kannst du mir sagen, {what} {d} ist?
        Ich möchte wissen, {what} {d} ist.
        {D}?
        Weißt du, {what} {d} ist?
        Könntest du mir sagen, {what} {d} ist?
        Hilf mir: {what} ist {d}?
        Ich brauche {da}.
        Könntest du mir {da} nennen?
    """,
    "fr": """
        {What} est {d} ?
        Dis-moi {what} est {d}.
        Indique {d}, s'il te plaît.
        Connais-tu {d} ?
        Peux-tu me dire {what} est {d} ?
        Je voudrais savoir {what} est {d}.
        {D} ?
        Sais-tu {what} est {d} ?
        Pourrais-tu me dire {what} est {d} ?
        Aide-moi : {what} est {d} ?
        J'ai besoin de savoir {what} est {d}.
        Pourrais-tu m'indiquer {d} ?
    """,
    "it": """
        {What} {d}?
        Dimmi {what} {d}.
        Indica {d}, per favore.
        Conosci {d}?
        Puoi dirmi {what} {d}?
        Vorrei sapere {what} {d}.
        {D}?
        Sai {what} {d}?
        Potresti dirmi {what} {d}?
        Aiutami: {what} {d}?
        Mi serve {d}.
        Potresti indicarmi {d}?
    """,
}

_QUESTIONS: Final = {
    "capital": {
        "en": """
            Which city is the capital {of}?
            What is the capital city {of}?
            What is the name of the capital {of}?
            The capital {of} is which city?
            Which city is known as the capital {of}?
        """,
        "de": """
            Wie heißt die Hauptstadt {of}?
            Welche Stadt ist die Hauptstadt {of}?
            Wie lautet der Name der Hauptstadt {of}?
            Welche Stadt ist {place} die Hauptstadt?
            Welche Stadt kennt man als Hauptstadt {of}?
        """,
        "fr": """
            Quelle ville est la capitale {of} ?
            Comment s'appelle la capitale {of} ?
            Quel est le nom de la capitale {of} ?
            La capitale {of}, c'est quelle ville ?
            Quelle ville est connue comme la capitale {of} ?
        """,
        "it": """
            Quale città è la capitale {of}?
            Come si chiama la capitale {of}?
            Qual è il nome della capitale {of}?
            La capitale {of} è quale città?
            Quale città è nota come capitale {of}?
        """,
    },
    "currency": {
        "en": """
            Which currency is used {place}?
            What money do people use {place}?
            What do people pay with {place}?
            Which currency do people pay with {place}?
            With which money does one pay {place}?
        """,
        "de": """
            Wie heißt die Währung {of}?
            Mit welcher Währung bezahlt man {place}?
            Womit bezahlt man {place}?
            Welche Währung benutzt man {place}?
            Mit welchem Geld bezahlt man {place}?
        """,
        "fr": """
            Quelle monnaie utilise-t-on {place} ?
            Avec quelle monnaie paie-t-on {place} ?
            Comment s'appelle la monnaie {of} ?
            Quelle est la monnaie utilisée {place} ?
            En quelle monnaie paie-t-on {place} ?
        """,
        "it": """
            Quale valuta si usa {place}?
            Con quale valuta si paga {place}?
            Come si chiama la valuta {of}?
            Qual è la moneta {of}?
            Con quale moneta si paga {place}?
        """,
    },
    "language": {
        "en": """
            Which language is spoken {place}?
            What language do people speak {place}?
            Which official language is used {place}?
            What is the name of the official language {of}?
            Which language do most people speak {place}?
        """,
        "de": """
            Welche Sprache spricht man {place}?
            Wie heißt die Amtssprache {of}?
            Welche Sprache wird {place} gesprochen?
            Welche Amtssprache gilt {place}?
            Welche Sprache sprechen die meisten Menschen {place}?
        """,
        "fr": """
            Quelle langue parle-t-on {place} ?
            Quelle langue est parlée {place} ?
            Comment s'appelle la langue officielle {of} ?
            Quelle langue officielle utilise-t-on {place} ?
            Quelle langue les gens parlent-ils {place} ?
        """,
        "it": """
            Quale lingua si parla {place}?
            Che lingua si parla {place}?
            Come si chiama la lingua ufficiale {of}?
            Quale lingua ufficiale si usa {place}?
            Quale lingua parla la gente {place}?
        """,
    },
    "symbol": {
        "en": """
            Which symbol stands for {x}?
            What symbol does {x} have in the periodic table?
            How is {x} written in chemistry?
            Which chemical symbol does {x} have?
            What symbol is used for {x}?
            What is the symbol of the element {x}?
        """,
        "de": """
            Welches Symbol hat {x}?
            Welches chemische Symbol hat {x}?
            Mit welchem Symbol schreibt man {x} in der Chemie?
            Wie lautet das Symbol für {x}?
            Welches Symbol benutzt man für {x}?
            Welches Symbol steht in der Chemie für {x}?
        """,
        "fr": """
            Quel symbole a {x} ?
            Quel symbole chimique désigne {x} ?
            Comment écrit-on {x} en chimie ?
            Quel est le symbole qui désigne {x} ?
            Par quel symbole désigne-t-on {x} ?
            Quel symbole utilise-t-on pour {x} ?
        """,
        "it": """
            Quale simbolo ha {x}?
            Quale simbolo chimico indica {x}?
            Come si scrive {x} in chimica?
            Qual è il simbolo che indica {x}?
            Con quale simbolo si indica {x}?
            Quale simbolo si usa per {x}?
        """,
    },
    "record": {
        "en": """
            Question: {what} is {d}?
            Name {d}.
            Let me ask you: {what} is {d}?
            I am looking for {d}.
        """,
        "de": """
            Eine Frage: {what} ist {d}?
            Nenne {da}.
            {D} ist {what}?
            Ich suche {da}.
        """,
        "fr": """
            Une question : {what} est {d} ?
            Nomme {d}.
            {D}, c'est quoi ?
            Je cherche {d}.
        """,
        "it": """
            Una domanda: {what} {d}?
            Nomina {d}.
            {D}, {what}?
            Cerco {d}.
        """,
    },
    "maker": {
        "en": """
            Who {past} {o}?
            Which person {past} {o}?
            By whom was {o} {pp}?
            {O} was {pp} by whom?
            Tell me who {past} {o}.
            Do you know who {past} {o}?
            What is the name of the person who {past} {o}?
            I would like to know who {past} {o}.
            Who is the person that {past} {o}?
        """,
        "de": """
            Wer hat {o} {pp}?
            Von wem wurde {o} {pp}?
            Welche Person hat {o} {pp}?
            Sag mir, wer {o} {pp} hat.
            Weißt du, wer {o} {pp} hat?
            Wie heißt die Person, die {o} {pp} hat?
            Ich möchte wissen, wer {o} {pp} hat.
            Kannst du mir sagen, wer {o} {pp} hat?
            Wer ist die Person, die {o} {pp} hat?
        """,
        "fr": """
            Qui a {pp} {o} ?
            Quelle personne a {pp} {o} ?
            Dis-moi qui a {pp} {o}.
            Sais-tu qui a {pp} {o} ?
            Comment s'appelle la personne qui a {pp} {o} ?
            Je voudrais savoir qui a {pp} {o}.
            Peux-tu me dire qui a {pp} {o} ?
            Qui est-ce qui a {pp} {o} ?
            Quelle est la personne qui a {pp} {o} ?
        """,
        "it": """
            Chi ha {pp} {o}?
            Quale persona ha {pp} {o}?
            Dimmi chi ha {pp} {o}.
            Sai chi ha {pp} {o}?
            Come si chiama la persona che ha {pp} {o}?
            Vorrei sapere chi ha {pp} {o}.
            Puoi dirmi chi ha {pp} {o}?
            Chi è che ha {pp} {o}?
            Chi è la persona che ha {pp} {o}?
        """,
    },
    "number": {
        "en": """
            How many {n} does {x} have?
            Tell me how many {n} {x} has.
            {X} has how many {n}?
            Do you know how many {n} {x} has?
            Can you tell me how many {n} {x} has?
            I would like to know how many {n} {x} has.
            What number of {n} does {x} have?
            How many {n} are there: {x}?
            What is the number of {n} that {x} has?
        """,
        "de": """
            Wie viele {n} hat {x}?
            Sag mir, wie viele {n} {x} hat.
            {X} hat wie viele {n}?
            Weißt du, wie viele {n} {x} hat?
            Kannst du mir sagen, wie viele {n} {x} hat?
            Ich möchte wissen, wie viele {n} {x} hat.
            Welche Anzahl {n} hat {x}?
            Wie viele {n} sind es: {x}?
            Welche Zahl stimmt: wie viele {n} hat {x}?
        """,
        "fr": """
            Combien {many} a {x} ?
            Dis-moi combien {many} a {x}.
            {X} a combien {many} ?
            Sais-tu combien {many} a {x} ?
            Peux-tu me dire combien {many} a {x} ?
            Je voudrais savoir combien {many} a {x}.
            Quel nombre {many} a {x} ?
            {X}, c'est combien {many} ?
            Combien {many} possède {x} ?
        """,
        "it": """
            {Many} ha {x}?
            Dimmi {many} ha {x}.
            {X} ha {many}?
            Sai {many} ha {x}?
            Puoi dirmi {many} ha {x}?
            Vorrei sapere {many} ha {x}.
            Che numero di {n} ha {x}?
            {X}: {many} sono?
            Qual è il numero di {n} che ha {x}?
        """,
    },
}

# First the answer of the chat, then statements for plain text; the first one serves in both.
_DESCRIBED: Final[dict[str, tuple[str, ...]]] = {
    "en": ("{D} is {v}.", "{V} is {d}."),
    "de": ("{D} ist {v}.", "{V} ist {d}."),
    "fr": ("{D} est {v}.", "{V} est {d}."),
    "it": ("{D} è {v}.", "{V} è {d}."),
}
_MADE: Final[dict[str, tuple[str, ...]]] = {
    "en": ("{V} {past} {o}.", "{O} was {pp} by {v}."),
    "de": ("{V} hat {o} {pp}.", "{O} wurde von {v} {pp}."),
    "fr": ("{V} a {pp} {o}.", "La personne qui a {pp} {o} est {v}."),
    "it": ("{V} ha {pp} {o}.", "La persona che ha {pp} {o} è {v}."),
}
_COUNTED: Final[dict[str, tuple[str, ...]]] = {
    "en": ("{X} has {v} {n}.",),
    "de": ("{X} hat {v} {n}.",),
    "fr": ("{X} a {v} {n}.",),
    "it": ("{X} ha {v} {n}.",),
}

_THOUGHTS: Final = {
    "described": {
        "en": "The question is about {d}.",
        "de": "Es geht um {da}.",
        "fr": "On demande {d}.",
        "it": "Si chiede {d}.",
    },
    "maker": {
        "en": "The question is who {past} {o}.",
        "de": "Es geht darum, wer {o} {pp} hat.",
        "fr": "On demande qui a {pp} {o}.",
        "it": "Si chiede chi ha {pp} {o}.",
    },
    "number": {
        "en": "The question is how many {n} {x} has.",
        "de": "Es geht darum, wie viele {n} {x} hat.",
        "fr": "On demande combien {many} a {x}.",
        "it": "Si chiede {many} ha {x}.",
    },
}

_OPENERS: Final = {
    "en": ("Please tell me: ", "Please answer: ", "A question: ", "Hello! "),
    "de": ("Sag mir bitte: ", "Bitte antworte: ", "Frage: ", "Hallo! "),
    "fr": ("Dis-moi, s'il te plaît : ", "Réponds : ", "Question : ", "Bonjour ! "),
    "it": ("Dimmi, per favore: ", "Rispondi: ", "Domanda: ", "Ciao! "),
}

PLAIN_SYSTEMS: Final = {
    "en": ("You are a helpful assistant.", "Be helpful.", "Answer in full sentences."),
    "de": ("Du bist ein hilfreicher Assistent.", "Sei hilfreich.", "Antworte in ganzen Sätzen."),
    "fr": ("Tu es un assistant utile.", "Sois utile.", "Réponds par des phrases complètes."),
    "it": ("Sei un assistente utile.", "Sii utile.", "Rispondi con frasi complete."),
}
BRIEF_SYSTEMS: Final = {
    "en": ("Answer briefly.", "Be brief.", "Be concise."),
    "de": ("Antworte kurz.", "Fasse dich kurz."),
    "fr": ("Réponds brièvement.", "Sois bref."),
    "it": ("Rispondi brevemente.", "Sii breve."),
}

# Blocks of questions with one answer each: the lines before ">" all get that answer.
_SMALL_TALK: Final = {
    "en": """
        Hello|Hello!|Hi|Hi!|Hi there|Good morning|Hey|Hello there! > Hello! How can I help you?
        Who are you?|What are you?|Tell me who you are.|Introduce yourself.|What is your name?|Are you Apertus? > I am a small demonstration model of apertus-mlx, in the Apertus architecture. I know a small table of facts.
        Thank you|Thank you!|Thanks|Thanks!|Thanks a lot|Great, thanks. > You are welcome!
        How are you?|How are you doing?|How is it going? > I am fine, thank you. How can I help you?
        What can you do?|What do you know?|Can you help me?|What can I ask you? > I can answer questions about capitals, currencies, languages, elements, planets, books and numbers.
        Which languages do you speak?|What languages do you know?|Do you speak German? > I speak English, German, French and Italian.
        Goodbye|Bye|Bye!|See you later > Goodbye!
    """,  # noqa: E501
    "de": """
        Hallo|Hallo!|Guten Tag|Guten Morgen|Hi|Grüezi|Hey|Guten Abend > Hallo! Wie kann ich dir helfen?
        Wer bist du?|Was bist du?|Sag mir, wer du bist.|Stell dich vor.|Wie heißt du?|Bist du Apertus? > Ich bin ein kleines Demonstrationsmodell von apertus-mlx, in der Apertus-Architektur. Ich kenne eine kleine Tabelle von Fakten.
        Danke|Danke!|Vielen Dank|Vielen Dank!|Danke schön|Super, danke. > Gern geschehen!
        Wie geht es dir?|Wie geht's?|Geht es dir gut? > Mir geht es gut, danke. Wie kann ich dir helfen?
        Was kannst du?|Was weißt du?|Kannst du mir helfen?|Was kann ich dich fragen? > Ich kann Fragen zu Hauptstädten, Währungen, Sprachen, Elementen, Planeten, Büchern und Zahlen beantworten.
        Welche Sprachen sprichst du?|Welche Sprachen kennst du?|Sprichst du Deutsch? > Ich spreche Englisch, Deutsch, Französisch und Italienisch.
        Auf Wiedersehen|Tschüss|Tschüss!|Bis später > Auf Wiedersehen!
    """,  # noqa: E501
    "fr": """
        Bonjour|Bonjour !|Salut|Salut !|Bonsoir|Coucou > Bonjour ! Comment puis-je t'aider ?
        Qui es-tu ?|Qu'es-tu ?|Dis-moi qui tu es.|Présente-toi.|Comment t'appelles-tu ?|Es-tu Apertus ? > Je suis un petit modèle de démonstration d'apertus-mlx, à l'architecture Apertus. Je connais une petite table de faits.
        Merci|Merci !|Merci beaucoup|Merci beaucoup !|Super, merci. > De rien !
        Comment vas-tu ?|Ça va ?|Comment ça va ? > Je vais bien, merci. Comment puis-je t'aider ?
        Que sais-tu faire ?|Que sais-tu ?|Peux-tu m'aider ?|Que puis-je te demander ? > Je sais répondre à des questions sur les capitales, les monnaies, les langues, les éléments, les planètes, les livres et les nombres.
        Quelles langues parles-tu ?|Quelles langues connais-tu ?|Parles-tu français ? > Je parle anglais, allemand, français et italien.
        Au revoir|Au revoir !|À bientôt|À plus tard > Au revoir !
    """,  # noqa: E501
    "it": """
        Ciao|Ciao!|Buongiorno|Buongiorno!|Buonasera|Salve > Ciao! Come posso aiutarti?
        Chi sei?|Che cosa sei?|Dimmi chi sei.|Presentati.|Come ti chiami?|Sei Apertus? > Sono un piccolo modello dimostrativo di apertus-mlx, nell'architettura Apertus. Conosco una piccola tabella di fatti.
        Grazie|Grazie!|Grazie mille|Grazie mille!|Ottimo, grazie. > Prego!
        Come stai?|Come va?|Tutto bene? > Sto bene, grazie. Come posso aiutarti?
        Che cosa sai fare?|Che cosa sai?|Puoi aiutarmi?|Che cosa posso chiederti? > So rispondere a domande su capitali, valute, lingue, elementi, pianeti, libri e numeri.
        Quali lingue parli?|Quali lingue conosci?|Parli italiano? > Parlo inglese, tedesco, francese e italiano.
        Arrivederci|Arrivederci!|A presto|A più tardi > Arrivederci!
    """,  # noqa: E501
}

UNKNOWN_ANSWERS: Final = {
    "en": "I do not know. I only know a small table of facts.",
    "de": "Das weiß ich nicht. Ich kenne nur eine kleine Tabelle von Fakten.",
    "fr": "Je ne sais pas. Je ne connais qu'une petite table de faits.",
    "it": "Non lo so. Conosco solo una piccola tabella di fatti.",
}
_UNKNOWN: Final = {
    "en": """
        What will the weather be like tomorrow?
        Who won the game yesterday?
        What is my name?
        What time is it?
        Write a poem about the sea.
        How do I cook soup?
        What is the meaning of life?
        What did I eat today?
        Who is the president?
        What is 17 times 23?
        Tell me a joke.
        Which film should I watch?
        How old am I?
        What is the capital of Mongolia?
        What is the capital of Kenya?
        What is the capital of Peru?
        What is the currency of Vietnam?
        Who wrote Emma?
    """,
    "de": """
        Wie wird das Wetter morgen?
        Wer hat gestern das Spiel gewonnen?
        Wie heiße ich?
        Wie spät ist es?
        Schreibe ein Gedicht über das Meer.
        Wie koche ich Suppe?
        Was ist der Sinn des Lebens?
        Was habe ich heute gegessen?
        Wer ist der Präsident?
        Was ist 17 mal 23?
        Erzähl mir einen Witz.
        Welchen Film soll ich sehen?
        Wie alt bin ich?
        Was ist die Hauptstadt der Mongolei?
        Was ist die Hauptstadt von Kenia?
        Was ist die Hauptstadt von Peru?
        Was ist die Währung von Vietnam?
        Wer hat Emma geschrieben?
    """,
    "fr": """
        Quel temps fera-t-il demain ?
        Qui a gagné le match hier ?
        Comment je m'appelle ?
        Quelle heure est-il ?
        Écris un poème sur la mer.
        Comment faire une soupe ?
        Quel est le sens de la vie ?
        Qu'ai-je mangé aujourd'hui ?
        Qui est le président ?
        Combien font 17 fois 23 ?
        Raconte-moi une blague.
        Quel film dois-je regarder ?
        Quel âge ai-je ?
        Quelle est la capitale de la Mongolie ?
        Quelle est la capitale du Kenya ?
        Quelle est la capitale du Pérou ?
        Quelle est la monnaie du Vietnam ?
        Qui a écrit Emma ?
    """,
    "it": """
        Che tempo farà domani?
        Chi ha vinto la partita ieri?
        Come mi chiamo?
        Che ore sono?
        Scrivi una poesia sul mare.
        Come si cucina la zuppa?
        Qual è il senso della vita?
        Che cosa ho mangiato oggi?
        Chi è il presidente?
        Quanto fa 17 per 23?
        Raccontami una barzelletta.
        Quale film devo guardare?
        Quanti anni ho?
        Qual è la capitale della Mongolia?
        Qual è la capitale del Kenya?
        Qual è la capitale del Perù?
        Qual è la valuta del Vietnam?
        Chi ha scritto Emma?
    """,
}


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.strip().splitlines())


UNKNOWN_QUESTIONS: Final = {language: _lines(block) for language, block in _UNKNOWN.items()}
SMALL_TALK: Final = {
    language: tuple(
        (tuple(q.strip() for q in questions.split("|")), answer.strip())
        for questions, answer in (line.split(" > ") for line in _lines(block))
    )
    for language, block in _SMALL_TALK.items()
}


def _numbered(prefix: str, block: str) -> Iterator[Wording]:
    lines = _lines(block)
    for number, line in enumerate(lines):
        yield Wording(f"{prefix}{number}", line, held_out=number == len(lines) - 1)


def _is_described(kind: str) -> bool:
    return kind not in ("maker", "number")


def wordings(kind: str, language: str) -> tuple[Wording, ...]:
    """Return all question wordings of a kind in a language, held-out ones included."""
    frames = _numbered("frame", _FRAMES[language]) if _is_described(kind) else ()
    return (*frames, *_numbered(kind, _QUESTIONS[kind][language]))


def statements(fact: Fact, language: str) -> tuple[str, ...]:
    """Return the sentences that state ``fact``; the first one is also the answer in chat."""
    table = {"maker": _MADE, "number": _COUNTED}.get(fact.kind, _DESCRIBED)
    slots = fact.local[language].slots
    return tuple(template.format_map(slots) for template in table[language])


def answers(fact: Fact, language: str) -> str:
    """Return the full-sentence answer."""
    return statements(fact, language)[0]


def brief_answer(fact: Fact, language: str) -> str:
    """Return the answer given under a "be brief" system text."""
    return fact.local[language].slots["V"] + "."


def thought(fact: Fact, language: str) -> str:
    """Return the one short thought used when deliberation is enabled."""
    group = "described" if _is_described(fact.kind) else fact.kind
    return _THOUGHTS[group][language].format_map(fact.local[language].slots)


def openers(language: str) -> tuple[str, ...]:
    """Return phrases that may precede a question without changing it."""
    return _OPENERS[language]
