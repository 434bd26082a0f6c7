"""Owns the table of facts: what the embedded model knows, in four languages.

Every fact belongs to a kind (capital, currency, ...) and carries, per language, the slots that the
wordings of that kind fill in, the value as it reads inside a sentence, and the accepted spellings.
Rows are written as text tables because localized names with their articles are easiest to proofread
side by side. Columns are separated by ``|``; within one cell, ``;`` separates grammatical forms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["FACTS", "KINDS", "LANGUAGES", "Fact", "Local", "capitalize"]

LANGUAGES: Final = ("en", "de", "fr", "it")
KINDS: Final = ("capital", "currency", "language", "symbol", "record", "maker", "number")

_ARTICLES: Final = {
    "en": ("the ",),
    "de": ("der ", "die ", "das "),
    "fr": ("le ", "la ", "l'"),
    "it": ("il ", "lo ", "la ", "l'"),
}


@dataclass(frozen=True)
class Local:
    """One fact in one language: the slots of its wordings and the accepted answers."""

    slots: Mapping[str, str]
    gold: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact, in every language of the table."""

    name: str
    kind: str
    local: Mapping[str, Local]


def capitalize(text: str) -> str:
    """Upper-case the first character and leave the rest as it is."""
    return text[:1].upper() + text[1:]


# Country: en name | de genitive; de place | fr genitive; fr place | it genitive; it place
_PLACES: Final = """
france      | France             | von Frankreich; in Frankreich       | de la France; en France         | della Francia; in Francia
germany     | Germany            | von Deutschland; in Deutschland     | de l'Allemagne; en Allemagne    | della Germania; in Germania
italy       | Italy              | von Italien; in Italien             | de l'Italie; en Italie          | dell'Italia; in Italia
austria     | Austria            | von Österreich; in Österreich       | de l'Autriche; en Autriche      | dell'Austria; in Austria
switzerland | Switzerland        | der Schweiz; in der Schweiz         | de la Suisse; en Suisse         | della Svizzera; in Svizzera
spain       | Spain              | von Spanien; in Spanien             | de l'Espagne; en Espagne        | della Spagna; in Spagna
portugal    | Portugal           | von Portugal; in Portugal           | du Portugal; au Portugal        | del Portogallo; in Portogallo
uk          | the United Kingdom | des Vereinigten Königreichs; im Vereinigten Königreich | du Royaume-Uni; au Royaume-Uni | del Regno Unito; nel Regno Unito
ireland     | Ireland            | von Irland; in Irland               | de l'Irlande; en Irlande        | dell'Irlanda; in Irlanda
netherlands | the Netherlands    | der Niederlande; in den Niederlanden | des Pays-Bas; aux Pays-Bas     | dei Paesi Bassi; nei Paesi Bassi
belgium     | Belgium            | von Belgien; in Belgien             | de la Belgique; en Belgique     | del Belgio; in Belgio
denmark     | Denmark            | von Dänemark; in Dänemark           | du Danemark; au Danemark        | della Danimarca; in Danimarca
norway      | Norway             | von Norwegen; in Norwegen           | de la Norvège; en Norvège       | della Norvegia; in Norvegia
sweden      | Sweden             | von Schweden; in Schweden           | de la Suède; en Suède           | della Svezia; in Svezia
finland     | Finland            | von Finnland; in Finnland           | de la Finlande; en Finlande     | della Finlandia; in Finlandia
poland      | Poland             | von Polen; in Polen                 | de la Pologne; en Pologne       | della Polonia; in Polonia
hungary     | Hungary            | von Ungarn; in Ungarn               | de la Hongrie; en Hongrie       | dell'Ungheria; in Ungheria
greece      | Greece             | von Griechenland; in Griechenland   | de la Grèce; en Grèce           | della Grecia; in Grecia
turkey      | Turkey             | der Türkei; in der Türkei           | de la Turquie; en Turquie       | della Turchia; in Turchia
russia      | Russia             | von Russland; in Russland           | de la Russie; en Russie         | della Russia; in Russia
japan       | Japan              | von Japan; in Japan                 | du Japon; au Japon              | del Giappone; in Giappone
china       | China              | von China; in China                 | de la Chine; en Chine           | della Cina; in Cina
india       | India              | von Indien; in Indien               | de l'Inde; en Inde              | dell'India; in India
egypt       | Egypt              | von Ägypten; in Ägypten             | de l'Égypte; en Égypte          | dell'Egitto; in Egitto
usa         | the United States  | der Vereinigten Staaten; in den Vereinigten Staaten | des États-Unis; aux États-Unis | degli Stati Uniti; negli Stati Uniti
brazil      | Brazil             | von Brasilien; in Brasilien         | du Brésil; au Brésil            | del Brasile; in Brasile
argentina   | Argentina          | von Argentinien; in Argentinien     | de l'Argentine; en Argentine    | dell'Argentina; in Argentina
canada      | Canada             | von Kanada; in Kanada               | du Canada; au Canada            | del Canada; in Canada
"""  # noqa: E501

# Country | value in en | de | fr | it; further accepted spellings follow ";"
_CAPITALS: Final = """
france      | Paris        | Paris        | Paris        | Parigi
germany     | Berlin       | Berlin       | Berlin       | Berlino
italy       | Rome         | Rom          | Rome         | Roma
austria     | Vienna       | Wien         | Vienne       | Vienna
switzerland | Bern; Berne  | Bern         | Berne        | Berna
spain       | Madrid       | Madrid       | Madrid       | Madrid
portugal    | Lisbon       | Lissabon     | Lisbonne     | Lisbona
uk          | London       | London       | Londres      | Londra
ireland     | Dublin       | Dublin       | Dublin       | Dublino
netherlands | Amsterdam    | Amsterdam    | Amsterdam    | Amsterdam
belgium     | Brussels     | Brüssel      | Bruxelles    | Bruxelles
denmark     | Copenhagen   | Kopenhagen   | Copenhague   | Copenaghen
norway      | Oslo         | Oslo         | Oslo         | Oslo
sweden      | Stockholm    | Stockholm    | Stockholm    | Stoccolma
finland     | Helsinki     | Helsinki     | Helsinki     | Helsinki
poland      | Warsaw       | Warschau     | Varsovie     | Varsavia
hungary     | Budapest     | Budapest     | Budapest     | Budapest
greece      | Athens       | Athen        | Athènes      | Atene
turkey      | Ankara       | Ankara       | Ankara       | Ankara
russia      | Moscow       | Moskau       | Moscou       | Mosca
japan       | Tokyo        | Tokio; Tokyo | Tokyo        | Tokyo
china       | Beijing      | Peking       | Pékin        | Pechino
india       | New Delhi    | Neu-Delhi    | New Delhi    | Nuova Delhi
egypt       | Cairo        | Kairo        | Le Caire     | Il Cairo
usa         | Washington   | Washington   | Washington   | Washington
brazil      | Brasília; Brasilia | Brasília; Brasilia | Brasília; Brasilia | Brasilia
argentina   | Buenos Aires | Buenos Aires | Buenos Aires | Buenos Aires
canada      | Ottawa       | Ottawa       | Ottawa       | Ottawa
"""

_CURRENCIES: Final = """
switzerland | the Swiss franc    | der Schweizer Franken | le franc suisse     | il franco svizzero
japan       | the yen            | der Yen               | le yen              | lo yen
uk          | the pound sterling | das Pfund Sterling    | la livre sterling   | la sterlina
usa         | the US dollar      | der US-Dollar         | le dollar américain | il dollaro statunitense
poland      | the zloty          | der Zloty             | le zloty            | lo zloty
sweden      | the Swedish krona  | die Schwedische Krone | la couronne suédoise | la corona svedese
denmark     | the Danish krone   | die Dänische Krone    | la couronne danoise | la corona danese
hungary     | the forint         | der Forint            | le forint           | il fiorino ungherese
turkey      | the Turkish lira   | die Türkische Lira    | la livre turque     | la lira turca
germany     | the euro           | der Euro              | l'euro              | l'euro
russia      | the rouble; ruble  | der Rubel             | le rouble           | il rublo
china       | the yuan           | der Yuan              | le yuan             | lo yuan
"""  # noqa: E501

_OFFICIAL_LANGUAGES: Final = """
france   | French     | Französisch   | le français   | il francese
germany  | German     | Deutsch       | l'allemand    | il tedesco
italy    | Italian    | Italienisch   | l'italien     | l'italiano
spain    | Spanish    | Spanisch      | l'espagnol    | lo spagnolo
brazil   | Portuguese | Portugiesisch | le portugais  | il portoghese
japan    | Japanese   | Japanisch     | le japonais   | il giapponese
poland   | Polish     | Polnisch      | le polonais   | il polacco
sweden   | Swedish    | Schwedisch    | le suédois    | lo svedese
denmark  | Danish     | Dänisch       | le danois     | il danese
hungary  | Hungarian  | Ungarisch     | le hongrois   | l'ungherese
greece   | Greek      | Griechisch    | le grec       | il greco
turkey   | Turkish    | Türkisch      | le turc       | il turco
russia   | Russian    | Russisch      | le russe      | il russo
egypt    | Arabic     | Arabisch      | l'arabe       | l'arabo
"""

# Symbol | element in en | de | fr with article | it with article
_ELEMENTS: Final = """
H  | hydrogen  | Wasserstoff | l'hydrogène  | l'idrogeno
O  | oxygen    | Sauerstoff  | l'oxygène    | l'ossigeno
C  | carbon    | Kohlenstoff | le carbone   | il carbonio
N  | nitrogen  | Stickstoff  | l'azote      | l'azoto
Fe | iron      | Eisen       | le fer       | il ferro
Au | gold      | Gold        | l'or         | l'oro
Ag | silver    | Silber      | l'argent     | l'argento
Cu | copper    | Kupfer      | le cuivre    | il rame
Na | sodium    | Natrium     | le sodium    | il sodio
Pb | lead      | Blei        | le plomb     | il piombo
Sn | tin       | Zinn        | l'étain      | lo stagno
He | helium    | Helium      | l'hélium     | l'elio
K  | potassium | Kalium      | le potassium | il potassio
"""

# Name and question word (t thing, p person; French gender m or f), then per language
# "description = value; further accepted spellings". German gives "nominative / accusative" where
# they differ.
_RECORDS: Final = """
everest tf | the highest mountain in the world = Mount Everest; Everest
           | der höchste Berg der Welt / den höchsten Berg der Welt = der Mount Everest; Everest
           | la plus haute montagne du monde = le mont Everest; Everest
           | la montagna più alta del mondo = il monte Everest; Everest
dufour tf  | the highest mountain in Switzerland = the Dufourspitze
           | der höchste Berg der Schweiz / den höchsten Berg der Schweiz = die Dufourspitze
           | la plus haute montagne de Suisse = la pointe Dufour; Pointe Dufour
           | la montagna più alta della Svizzera = la Punta Dufour
montblanc tf | the highest mountain in the Alps = Mont Blanc
           | der höchste Berg der Alpen / den höchsten Berg der Alpen = der Mont Blanc
           | la plus haute montagne des Alpes = le mont Blanc; Mont Blanc
           | la montagna più alta delle Alpi = il Monte Bianco
kilimanjaro tf | the highest mountain in Africa = Kilimanjaro
           | der höchste Berg Afrikas / den höchsten Berg Afrikas = der Kilimandscharo
           | la plus haute montagne d'Afrique = le Kilimandjaro
           | la montagna più alta dell'Africa = il Kilimangiaro
nile tm    | the longest river in Africa = the Nile
           | der längste Fluss Afrikas / den längsten Fluss Afrikas = der Nil
           | le plus long fleuve d'Afrique = le Nil
           | il fiume più lungo dell'Africa = il Nilo
amazon tm  | the longest river in South America = the Amazon
           | der längste Fluss Südamerikas / den längsten Fluss Südamerikas = der Amazonas
           | le plus long fleuve d'Amérique du Sud = l'Amazone
           | il fiume più lungo dell'America del Sud = il Rio delle Amazzoni
jupiter tf | the largest planet in the solar system = Jupiter
           | der größte Planet des Sonnensystems / den größten Planeten des Sonnensystems = Jupiter
           | la plus grande planète du système solaire = Jupiter
           | il pianeta più grande del sistema solare = Giove
mercury tf | the smallest planet in the solar system = Mercury
           | der kleinste Planet des Sonnensystems / den kleinsten Planeten des Sonnensystems = Merkur
           | la plus petite planète du système solaire = Mercure
           | il pianeta più piccolo del sistema solare = Mercurio
mars tf    | the red planet = Mars
           | der Rote Planet / den Roten Planeten = Mars
           | la planète rouge = Mars
           | il pianeta rosso = Marte
saturn tf  | the planet famous for its rings = Saturn
           | der für seine Ringe bekannte Planet / den für seine Ringe bekannten Planeten = Saturn
           | la planète célèbre pour ses anneaux = Saturne
           | il pianeta famoso per i suoi anelli = Saturno
neptune tf | the planet farthest from the Sun = Neptune
           | der von der Sonne am weitesten entfernte Planet / den von der Sonne am weitesten entfernten Planeten = Neptun
           | la planète la plus éloignée du Soleil = Neptune
           | il pianeta più lontano dal Sole = Nettuno
pacific tm | the largest ocean on Earth = the Pacific Ocean; Pacific
           | der größte Ozean der Erde / den größten Ozean der Erde = der Pazifik; Pazifische Ozean
           | le plus grand océan de la Terre = l'océan Pacifique; Pacifique
           | l'oceano più grande della Terra = l'oceano Pacifico; Pacifico
whale tm   | the largest animal in the world = the blue whale
           | das größte Tier der Welt = der Blauwal
           | le plus grand animal du monde = la baleine bleue
           | l'animale più grande del mondo = la balenottera azzurra
giraffe tm | the animal with the longest neck = the giraffe
           | das Tier mit dem längsten Hals = die Giraffe
           | l'animal au cou le plus long = la girafe
           | l'animale con il collo più lungo = la giraffa
cheetah tm | the fastest land animal = the cheetah
           | das schnellste Landtier = der Gepard
           | l'animal terrestre le plus rapide = le guépard
           | l'animale terrestre più veloce = il ghepardo
skin tm    | the largest organ of the human body = the skin
           | das größte Organ des menschlichen Körpers = die Haut
           | le plus grand organe du corps humain = la peau
           | l'organo più grande del corpo umano = la pelle
largest tm | the largest country in the world = Russia
           | das größte Land der Welt = Russland
           | le plus grand pays du monde = la Russie
           | il paese più grande del mondo = la Russia
smallest tm | the smallest country in the world = Vatican City; Vatican
           | das kleinste Land der Welt = die Vatikanstadt; Vatikan
           | le plus petit pays du monde = le Vatican
           | il paese più piccolo del mondo = la Città del Vaticano; Vaticano
zurich tf  | the largest city in Switzerland = Zurich; Zürich
           | die größte Stadt der Schweiz = Zürich
           | la plus grande ville de Suisse = Zurich
           | la città più grande della Svizzera = Zurigo
diamond tm | the hardest natural mineral = diamond
           | das härteste natürliche Mineral = der Diamant
           | le minéral naturel le plus dur = le diamant
           | il minerale naturale più duro = il diamante
water tf   | the chemical formula of water = H2O
           | die chemische Formel von Wasser = H2O
           | la formule chimique de l'eau = H2O
           | la formula chimica dell'acqua = H2O
holiday tf | the date of the Swiss national day = 1 August
           | das Datum des Schweizer Nationalfeiertags = der 1. August
           | la date de la fête nationale suisse = le 1er août
           | la data della festa nazionale svizzera = il 1° agosto
tell pm    | the national hero of Switzerland = William Tell
           | der Schweizer Nationalheld / den Schweizer Nationalhelden = Wilhelm Tell
           | le héros national suisse = Guillaume Tell
           | l'eroe nazionale svizzero = Guglielmo Tell
sun tf     | the star at the centre of the solar system = the Sun; sun
           | der Stern im Zentrum des Sonnensystems / den Stern im Zentrum des Sonnensystems = die Sonne
           | l'étoile au centre du système solaire = le Soleil; soleil
           | la stella al centro del sistema solare = il Sole; sole
ticino tm  | the capital of the canton of Ticino = Bellinzona
           | der Hauptort des Kantons Tessin / den Hauptort des Kantons Tessin = Bellinzona
           | le chef-lieu du canton du Tessin = Bellinzone
           | il capoluogo del Canton Ticino = Bellinzona
vaud tm    | the capital of the canton of Vaud = Lausanne
           | der Hauptort des Kantons Waadt / den Hauptort des Kantons Waadt = Lausanne
           | le chef-lieu du canton de Vaud = Lausanne
           | il capoluogo del Canton Vaud = Losanna
grisons tm | the capital of the canton of Graubünden = Chur
           | der Hauptort des Kantons Graubünden / den Hauptort des Kantons Graubünden = Chur
           | le chef-lieu du canton des Grisons = Coire
           | il capoluogo del Canton Grigioni = Coira
valais tm  | the capital of the canton of Valais = Sion
           | der Hauptort des Kantons Wallis / den Hauptort des Kantons Wallis = Sitten
           | le chef-lieu du canton du Valais = Sion
           | il capoluogo del Canton Vallese = Sion
"""  # noqa: E501

# Verb: en past; en participle | de participle | fr participle | it participle
_VERBS: Final = """
write    | wrote; written        | geschrieben | écrit     | scritto
paint    | painted; painted      | gemalt      | peint     | dipinto
compose  | composed; composed    | komponiert  | composé   | composto
invent   | invented; invented    | erfunden    | inventé   | inventato
discover | discovered; discovered | entdeckt   | découvert | scoperto
develop  | developed; developed  | entwickelt  | développé | sviluppato
found    | founded; founded      | gegründet   | fondé     | fondato
"""

# Verb | "work = person" per language; only works whose German nominative and accusative agree
_MAKERS: Final = """
write | Hamlet = William Shakespeare | Hamlet = William Shakespeare | Hamlet = William Shakespeare | Amleto = William Shakespeare
write | Faust = Johann Wolfgang von Goethe | Faust = Johann Wolfgang von Goethe | Faust = Johann Wolfgang von Goethe | Faust = Johann Wolfgang von Goethe
write | Don Quixote = Miguel de Cervantes | Don Quijote = Miguel de Cervantes | Don Quichotte = Miguel de Cervantes | Don Chisciotte = Miguel de Cervantes
write | the Divine Comedy = Dante Alighieri | die Göttliche Komödie = Dante Alighieri | la Divine Comédie = Dante Alighieri | la Divina Commedia = Dante Alighieri
write | War and Peace = Leo Tolstoy | Krieg und Frieden = Leo Tolstoi | Guerre et Paix = Léon Tolstoï | Guerra e pace = Lev Tolstoj
write | Heidi = Johanna Spyri | Heidi = Johanna Spyri | Heidi = Johanna Spyri | Heidi = Johanna Spyri
write | the Odyssey = Homer | die Odyssee = Homer | l'Odyssée = Homère | l'Odissea = Omero
write | The Betrothed = Alessandro Manzoni | Die Verlobten = Alessandro Manzoni | Les Fiancés = Alessandro Manzoni | I promessi sposi = Alessandro Manzoni
write | Pinocchio = Carlo Collodi | Pinocchio = Carlo Collodi | Pinocchio = Carlo Collodi | Pinocchio = Carlo Collodi
write | The Metamorphosis = Franz Kafka | Die Verwandlung = Franz Kafka | La Métamorphose = Franz Kafka | La metamorfosi = Franz Kafka
paint | the Mona Lisa = Leonardo da Vinci | die Mona Lisa = Leonardo da Vinci | la Joconde = Léonard de Vinci | la Gioconda = Leonardo da Vinci
paint | Guernica = Pablo Picasso | Guernica = Pablo Picasso | Guernica = Pablo Picasso | Guernica = Pablo Picasso
paint | The Starry Night = Vincent van Gogh | die Sternennacht = Vincent van Gogh | La Nuit étoilée = Vincent van Gogh | la Notte stellata = Vincent van Gogh
compose | The Magic Flute = Wolfgang Amadeus Mozart | die Zauberflöte = Wolfgang Amadeus Mozart | La Flûte enchantée = Wolfgang Amadeus Mozart | Il flauto magico = Wolfgang Amadeus Mozart
compose | Aida = Giuseppe Verdi | Aida = Giuseppe Verdi | Aïda = Giuseppe Verdi | Aida = Giuseppe Verdi
discover | penicillin = Alexander Fleming | das Penicillin = Alexander Fleming | la pénicilline = Alexander Fleming | la penicillina = Alexander Fleming
invent | dynamite = Alfred Nobel | das Dynamit = Alfred Nobel | la dynamite = Alfred Nobel | la dinamite = Alfred Nobel
invent | the electric battery = Alessandro Volta | die elektrische Batterie = Alessandro Volta | la pile électrique = Alessandro Volta | la pila elettrica = Alessandro Volta
develop | the theory of relativity = Albert Einstein | die Relativitätstheorie = Albert Einstein | la théorie de la relativité = Albert Einstein | la teoria della relatività = Albert Einstein
found | the Red Cross = Henry Dunant | das Rote Kreuz = Henry Dunant | la Croix-Rouge = Henry Dunant | la Croce Rossa = Henry Dunant
"""  # noqa: E501

# Number | "whole; parts" per language; Italian marks feminine parts with "+"
_NUMBERS: Final = """
60   | an hour; minutes           | eine Stunde; Minuten             | une heure; minutes              | un'ora; minuti
60   | a minute; seconds          | eine Minute; Sekunden            | une minute; secondes            | un minuto; secondi
24   | a day; hours               | ein Tag; Stunden                 | un jour; heures                 | un giorno; ore +
7    | a week; days               | eine Woche; Tage                 | une semaine; jours              | una settimana; giorni
12   | a year; months             | ein Jahr; Monate                 | une année; mois                 | un anno; mesi
100  | a century; years           | ein Jahrhundert; Jahre           | un siècle; années               | un secolo; anni
26   | Switzerland; cantons       | die Schweiz; Kantone             | la Suisse; cantons              | la Svizzera; cantoni
8    | the solar system; planets  | das Sonnensystem; Planeten       | le système solaire; planètes    | il sistema solare; pianeti
8    | a spider; legs             | eine Spinne; Beine               | une araignée; pattes            | un ragno; zampe +
6    | an insect; legs            | ein Insekt; Beine                | un insecte; pattes              | un insetto; zampe +
3    | a triangle; sides          | ein Dreieck; Seiten              | un triangle; côtés              | un triangolo; lati
4    | the human heart; chambers  | das menschliche Herz; Kammern    | le cœur humain; cavités         | il cuore umano; cavità +
4    | a violin; strings          | eine Geige; Saiten               | un violon; cordes               | un violino; corde +
11   | a football team; players   | eine Fußballmannschaft; Spieler  | une équipe de football; joueurs | una squadra di calcio; giocatori
100  | a metre; centimetres       | ein Meter; Zentimeter            | un mètre; centimètres           | un metro; centimetri
1000 | a kilogram; grams          | ein Kilogramm; Gramm             | un kilogramme; grammes          | un chilogrammo; grammi
90   | a right angle; degrees     | ein rechter Winkel; Grad         | un angle droit; degrés          | un angolo retto; gradi
206  | an adult human; bones      | ein erwachsener Mensch; Knochen  | un humain adulte; os            | un essere umano adulto; ossa +
"""  # noqa: E501


def _rows(table: str) -> list[list[str]]:
    """Split a text table into rows of cells; a line that starts with ``|`` continues a row."""
    rows: list[list[str]] = []
    for line in table.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1].extend(cells[1:])
    return rows


def _parts(cell: str, separator: str = ";") -> list[str]:
    return [part.strip() for part in cell.split(separator)]


def _bare(language: str, value: str) -> str:
    """Strip a leading article, which a right answer may leave out."""
    for article in _ARTICLES[language]:
        if value.startswith(article):
            return value.removeprefix(article)
    return value


def _local(language: str, value: str, accepted: list[str], **slots: str) -> Local:
    """Add the value and the capitalized twins of all slots."""
    slots["v"] = value
    full = dict(slots)
    for key, text in slots.items():
        full[key.capitalize()] = capitalize(text)
    bare = _bare(language, value)
    # A brief answer is a sentence of its own and may start with the bare value.
    spellings = dict.fromkeys((bare, *accepted, capitalize(bare)))
    return Local(full, tuple(spellings))


_DESCRIPTIONS: Final = {
    "capital": ("the capital of {}", "die Hauptstadt {}", "la capitale {}", "la capitale {}"),
    "currency": ("the currency of {}", "die Währung {}", "la monnaie {}", "la valuta {}"),
    "language": (
        "the official language of {}",
        "die Amtssprache {}",
        "la langue officielle {}",
        "la lingua ufficiale {}",
    ),
}


def _place_facts(kind: str, table: str) -> list[Fact]:
    places = {row[0]: row[1:] for row in _rows(table=_PLACES)}
    facts = []
    for name, *values in _rows(table):
        local = {}
        for language, cell, value, description in zip(
            LANGUAGES, places[name], values, _DESCRIPTIONS[kind], strict=True
        ):
            of, place = _parts(cell) if language != "en" else (cell, f"in {cell}")
            described = description.format(of)
            canonical, *accepted = _parts(value)
            local[language] = _local(
                language,
                canonical,
                accepted,
                d=described,
                da=described,
                what={"en": "what", "de": "was", "fr": "quelle", "it": "qual è"}[language],
                of=of if language != "en" else f"of {of}",
                place=place,
            )
        facts.append(Fact(f"{kind}:{name}", kind, local))
    return facts


def _genitive(language: str, noun: str) -> str:
    """Join French "de" or Italian "di" with the noun's article."""
    article, rest = (noun[:2], noun[2:]) if noun.startswith("l'") else noun.split(" ", 1)
    joined = {
        "fr": {"l'": "de l'", "le": "du "},
        "it": {"l'": "dell'", "il": "del ", "lo": "dello "},
    }[language]
    return joined[article] + rest


def _symbol_facts() -> list[Fact]:
    facts = []
    for symbol, english, german, french, italian in _rows(_ELEMENTS):
        described = {
            "en": ("what", english, f"the chemical symbol for {english}"),
            "de": ("was", german, f"das chemische Symbol für {german}"),
            "fr": ("quel", french, f"le symbole chimique {_genitive('fr', french)}"),
            "it": ("qual è", italian, f"il simbolo chimico {_genitive('it', italian)}"),
        }
        local = {
            language: _local(language, symbol, [], d=text, da=text, what=what, x=element)
            for language, (what, element, text) in described.items()
        }
        facts.append(Fact(f"symbol:{symbol}", "symbol", local))
    return facts


def _record_facts() -> list[Fact]:
    facts = []
    for head, *cells in _rows(_RECORDS):
        name, marks = head.split()
        role, gender = marks[0], marks[1]
        question = {
            "t": {"en": "what", "de": "was", "fr": "quel", "it": "qual è"},
            "p": {"en": "who", "de": "wer", "fr": "qui", "it": "chi è"},
        }[role]
        if role == "t" and gender == "f":
            question["fr"] = "quelle"
        local = {}
        for language, cell in zip(LANGUAGES, cells, strict=True):
            description, value = _parts(cell, "=")
            nominative, *others = _parts(description, "/")
            canonical, *accepted = _parts(value)
            local[language] = _local(
                language,
                canonical,
                accepted,
                d=nominative,
                da=others[0] if others else nominative,
                what=question[language],
            )
        facts.append(Fact(f"record:{name}", "record", local))
    return facts


def _maker_facts() -> list[Fact]:
    verbs = {row[0]: row[1:] for row in _rows(_VERBS)}
    facts = []
    for verb, *cells in _rows(_MAKERS):
        local = {}
        for language, cell, forms in zip(LANGUAGES, cells, verbs[verb], strict=True):
            work, person = _parts(cell, "=")
            past, participle = _parts(forms) if language == "en" else (forms, forms)
            surname = person.split()[-1]
            local[language] = _local(
                language,
                person,
                [surname, person.split()[0]] if surname in {"Alighieri", "Vinci"} else [surname],
                o=work,
                past=past,
                pp=participle,
            )
        facts.append(Fact(f"maker:{cells[0].split('=')[0].strip()}", "maker", local))
    return facts


def _number_facts() -> list[Fact]:
    facts = []
    for number, *cells in _rows(_NUMBERS):
        local = {}
        for language, cell in zip(LANGUAGES, cells, strict=True):
            whole, parts = _parts(cell)
            feminine = parts.endswith("+")
            parts = parts.rstrip("+ ")
            many = parts
            if language == "fr":
                many = f"d'{parts}" if parts[0] in "aehou" else f"de {parts}"
            if language == "it":
                many = f"{'quante' if feminine else 'quanti'} {parts}"
            local[language] = _local(language, number, [], x=whole, n=parts, many=many)
        whole, parts = _parts(cells[0])
        facts.append(Fact(f"number:{parts} of {whole}", "number", local))
    return facts


FACTS: Final = (
    *_place_facts("capital", _CAPITALS),
    *_place_facts("currency", _CURRENCIES),
    *_place_facts("language", _OFFICIAL_LANGUAGES),
    *_symbol_facts(),
    *_record_facts(),
    *_maker_facts(),
    *_number_facts(),
)
